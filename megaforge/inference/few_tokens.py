"""Full-precision matrices of a model that generates: a few tokens at a time are multiplied as fast as memory gives the
matrix (:mod:`megaforge.kernels.gemv`), more by torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaforge.kernels.gemv import gemv, is_compiled
from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.context import Axis
from megaforge.parallel.layers import linears
from megaforge.parallel.linear_op import PLAIN, PlainLinear
from megaforge.parallel.region import TensorParallelRegion


class FewTokenLinear(PlainLinear):
    """The product of :class:`PlainLinear` with sums in another order, without gradients; with them it is that one."""

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        (x,) = inside
        if runs is None:
            return gemv(x, weight, bias)
        out = x.new_zeros(x.shape[0], weight.shape[1])  # rows beyond the last run are nobody's
        for part, matrix in zip(runs.parts(), weight, strict=True):
            if part.start < part.stop:
                out[part] = gemv(x[part], matrix)
        return out

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: Axis | None = None,
        region: TensorParallelRegion | None = None,
        leaves: TensorParallelRegion | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        if torch.is_grad_enabled():
            return PLAIN.apply(x, weight, bias, axis=axis, region=region, leaves=leaves, runs=runs)
        inside = x if region is None or region.axis.size == 1 else region.gather(x)
        out = self.forward((inside,), weight, bias, runs)
        return out if leaves is None else leaves.exit(out)


def multiply_few_tokens_fast(model: nn.Module, device_type: str) -> int:
    """Sets :class:`FewTokenLinear` on every layer whose product is the plain one, where it is compiled; how many."""
    if not is_compiled(device_type):
        return 0
    plain = [layer for _, layer in linears(model) if layer.op is PLAIN]
    fast = FewTokenLinear()
    for layer in plain:
        layer.op = fast
    return len(plain)
