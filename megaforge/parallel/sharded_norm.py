"""Root-mean-square norm of features that are split over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.context import Axis


def _total(x: Tensor, axis: Axis) -> Tensor:
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


class _ShardedRMSNorm(torch.autograd.Function):
    """Forward: all-reduce of a sum of squares a token. Backward: all-reduce of a sum a token; the weight's gradient is
    that of this rank's features. Both sums are in fp64, so that however the features are split they round alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, axis: Axis) -> Tensor:
        wide = x.to(weight.dtype)
        squares = _total(wide.double().square().sum(-1, keepdim=True), axis)
        scale = squares.div_(x.shape[-1] * axis.size).add_(epsilon).rsqrt_().to(wide.dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.axis = axis
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(weight.dtype) * scale
        grad = grad.to(weight.dtype)
        product = grad * normed
        grad_weight = product.sum_to_size(weight.shape) if weight.dim() == 1 else product
        along = _total((product * weight).sum(-1, keepdim=True, dtype=torch.float64), ctx.axis)
        along = along.div_(x.shape[-1] * ctx.axis.size).to(product.dtype)
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None, None


def sharded_rms_norm(x: Tensor, weight: Tensor, epsilon: float, axis: Axis) -> Tensor:
    """:func:`megaforge.kernels.pointwise.rms_norm` over features of which each rank of ``axis`` has its part; the same
    bits however many they are.

    Args:
        x: [..., f / n], inside a tensor-parallel region: the same tokens on every rank.
        weight: fp32 (fp64) [f / n], or one for each row of ``x`` [R, f / n].
        epsilon: added to the mean square.

    Returns:
        Like ``x``.
    """
    return _ShardedRMSNorm.apply(x, weight, epsilon, axis)
