"""The differentiable collectives: one autograd function each.

The conjugate pairs f/g of Megatron-LM (Shoeybi et al., arXiv 1909.08053) and its sequence-parallel pair
(Korthikanti et al., arXiv 2205.05198). Every function is the identity on an axis of size one, in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.collectives import all_gather_single, reduce_scatter_single
from megaforge.parallel.context import Axis


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def all_gather_first(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' ``x`` one after the other along dim 0; not differentiable."""
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    all_gather_single(out, x.contiguous(), group=axis.group)
    return out


def _reduce_scatter_first(x: Tensor, axis: Axis) -> Tensor:
    if x.shape[0] % axis.size:
        raise ValueError(f"dim 0 of {tuple(x.shape)} is not divisible by {axis.name}={axis.size}")
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def _own_slice(x: Tensor, dim: int, axis: Axis) -> Tensor:
    if x.shape[dim] % axis.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} is not divisible by {axis.name}={axis.size}")
    return x.chunk(axis.size, dim=dim)[axis.rank].contiguous()


class _CopyToTensorParallel(torch.autograd.Function):
    """Forward: identity. Backward: all-reduce. Megatron-LM's f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.axis), None


class _ReduceFromTensorParallel(torch.autograd.Function):
    """Forward: all-reduce. Backward: identity. Megatron-LM's g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFromSequenceParallel(torch.autograd.Function):
    """Forward: all-gather along dim 0. Backward: reduce-scatter along dim 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_first(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_first(grad, ctx.axis), None


class _ReduceScatterToSequenceParallel(torch.autograd.Function):
    """Forward: reduce-scatter along dim 0. Backward: all-gather along dim 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter_first(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_first(grad, ctx.axis), None


class _GatherFromTensorParallel(torch.autograd.Function):
    """Forward: all-gather along the last dim. Backward: this rank's slice of the last dim.

    The slice is the whole gradient only if what follows computes the same thing on every rank.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_first(x.movedim(-1, 0), axis).movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_slice(grad, grad.dim() - 1, ctx.axis), None


class _GatherFromContextParallel(torch.autograd.Function):
    """Forward: all-gather along dim 0 and all chunks put in order. Backward: chunks put back, reduce-scatter.

    Rank r of n holds chunks r and 2n - 1 - r of 2n, one after the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        pairs = all_gather_first(x, axis).unflatten(0, (axis.size, 2, -1))
        return torch.cat([pairs[:, 0], pairs[:, 1].flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        early, late = grad.unflatten(0, (2, ctx.axis.size, -1))
        return _reduce_scatter_first(torch.stack([early, late.flip(0)], 1).flatten(0, 2), ctx.axis), None


class _ScaleGradient(torch.autograd.Function):
    """Forward: identity. Backward: multiply by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def copy_to_tensor_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Replicated ``x`` enters a region whose gradients are partial. Forward identity, backward all-reduce."""
    return x if axis.size == 1 else _CopyToTensorParallel.apply(x, axis)


def reduce_from_tensor_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums ``x`` become replicated. Forward all-reduce, backward identity."""
    return x if axis.size == 1 else _ReduceFromTensorParallel.apply(x, axis)


def gather_from_sequence_parallel(x: Tensor, axis: Axis) -> Tensor:
    """[s/n, ...] -> [s, ...], entering a region of partial gradients. Forward all-gather, backward reduce-scatter."""
    return x if axis.size == 1 else _GatherFromSequenceParallel.apply(x, axis)


def reduce_scatter_to_sequence_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [s, ...] -> [s/n, ...]. Forward reduce-scatter, backward all-gather.

    Raises:
        ValueError: the sequence is not divisible by the axis.
    """
    return x if axis.size == 1 else _ReduceScatterToSequenceParallel.apply(x, axis)


def gather_from_tensor_parallel(x: Tensor, axis: Axis) -> Tensor:
    """[..., c/n] -> [..., c], to be used alike on every rank. Forward all-gather, backward own slice."""
    return x if axis.size == 1 else _GatherFromTensorParallel.apply(x, axis)


def gather_from_context_parallel(x: Tensor, axis: Axis) -> Tensor:
    """This rank's two chunks [s/n, ...] -> the whole sequence [s, ...]. Forward all-gather, backward reduce-scatter.

    The chunks are held as :class:`megaforge.parallel.context_parallel.shard.ContextParallelShard` says.
    """
    return x if axis.size == 1 else _GatherFromContextParallel.apply(x, axis)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor``: a value that every rank of an axis computes in full
    enters a sum over that axis with 1/size."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)
