"""The operators ``torch.ops.megaforge.newton_schulz`` and ``newton_schulz_gram``. Their code for CPUs is in
``csrc/newton_schulz/cpu``; elsewhere they are :mod:`.reference`'s, on CPUs with :mod:`.tiles`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.kernels.native import define, load
from megaforge.kernels.newton_schulz import reference, tiles


def _triples(flat: Sequence[float]) -> list[tuple[float, float, float]]:
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def _orthogonalize(x: Tensor, coefficients: Sequence[float], gram: bool, narrow: bool, eps: float) -> Tensor:
    kept = reference.normalize(x, eps)
    kept = kept.bfloat16() if narrow else kept
    if gram:
        return (reference.by_gram_split if narrow else reference.by_gram)(kept, _triples(coefficients)).to(x.dtype)
    iterate = tiles.standard if x.device.type == "cpu" else reference.standard
    return iterate(kept, _triples(coefficients)).to(x.dtype)


def _polynomial(gram: Tensor, coefficients: Sequence[float]) -> Tensor:
    return reference.gram_polynomial(gram, _triples(coefficients))


define(
    "newton_schulz(Tensor x, float[] coefficients, bool gram, bool narrow, float eps) -> Tensor",
    lambda x, *_: x.new_empty(x.shape), _orthogonalize,
)  # fmt: skip
define(
    "newton_schulz_gram(Tensor gram, float[] coefficients) -> Tensor",
    lambda gram, _: gram.new_empty(gram.shape), _polynomial,
)  # fmt: skip

COMPILED = load("newton_schulz")


def orthogonalize(
    x: Tensor, triples: Sequence[tuple[float, float, float]], *, gram: bool, narrow: bool, eps: float
) -> Tensor:
    """Matrices [b, m, n], m <= n, in fp32 or fp64, normalised and iterated; ``narrow``: in bf16 (fp32 only)."""
    if x.dtype == torch.float64:
        return _orthogonalize(x, _flat(triples), gram, narrow, eps)
    result: Tensor = torch.ops.megaforge.newton_schulz(x, _flat(triples), gram, narrow, eps)
    return result


def polynomial(gram: Tensor, triples: Sequence[tuple[float, float, float]]) -> Tensor:
    """:func:`megaforge.kernels.newton_schulz.reference.gram_polynomial` of [b, m, m] in fp32 or fp64."""
    if gram.dtype == torch.float64:
        return reference.gram_polynomial(gram, triples)
    result: Tensor = torch.ops.megaforge.newton_schulz_gram(gram, _flat(triples))
    return result


def _flat(triples: Sequence[tuple[float, float, float]]) -> list[float]:
    return [float(value) for triple in triples for value in triple]
