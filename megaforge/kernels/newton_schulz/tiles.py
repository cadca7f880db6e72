"""The steps of the iteration on a CPU without compiled code: of products that are symmetric, torch computes bands of
rows up to the diagonal, and the rest is copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.kernels.newton_schulz import reference

SMALLEST = 512  # below, copies take what products save; in bf16 they do at any size
_BANDS, _LEAST_ROWS = 8, 128


def standard(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """:func:`megaforge.kernels.newton_schulz.reference.standard` of ``x`` [b, m, n], m <= n."""
    m = x.shape[1]
    if m < SMALLEST or x.dtype == torch.bfloat16:
        return reference.standard(x, steps)
    rows = max(-(-m // _BANDS), _LEAST_ROWS)
    bands = [slice(start, min(start + rows, m)) for start in range(0, m, rows)]
    gram, polynomial = x.new_empty(len(x), m, m), x.new_empty(len(x), m, m)
    for a, b, c in steps:
        for band in bands:
            _put(gram, band, torch.bmm(x[:, band], x[:, : band.stop].mT))
        for band in bands:
            own, others = gram[:, band], gram[:, : band.stop]
            _put(polynomial, band, torch.baddbmm(own[:, :, : band.stop], own, others.mT, beta=b, alpha=c))
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _put(into: Tensor, band: slice, values: Tensor) -> None:
    """Writes a band [b, rows, columns up to the diagonal] of a symmetric matrix into its rows and its columns."""
    into[:, band, : band.stop] = values
    into[:, : band.start, band] = values[:, :, : band.start].mT
