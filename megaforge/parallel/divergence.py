"""How far a head's predictions are from another head's, over a vocabulary split over tp, in token chunks: full
logits of neither exist at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.cross_entropy import chunk_rows
from megaforge.parallel.linear_op import PLAIN, LinearOp


class _Split(NamedTuple):
    """How logits are formed: on which axis, which of a rank's columns are of the vocabulary, at which temperature."""

    axis: Axis
    vocab_size: int
    temperature: float
    chunk: int

    def padding(self, weight: Tensor) -> slice:
        """This rank's columns behind the vocabulary."""
        return slice(min(max(self.vocab_size - self.axis.rank * weight.shape[0], 0), weight.shape[0]), None)

    def logits(self, op: LinearOp, inside: tuple[Tensor, ...], weight: Tensor, wide: torch.dtype) -> Tensor:
        scores = op.forward(inside, weight).to(wide).div_(self.temperature)
        scores[:, self.padding(weight)] = float("-inf")
        return scores


class _LinearDivergence(torch.autograd.Function):
    """Forward: all-reduces of [chunk] maxima, sums and results. Backward: local gradients, no collective; the softmaxes
    are computed again from the saved log-sum-exps, so memory is one chunk of logits of each model."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, ops: tuple[LinearOp, LinearOp],
        split: _Split,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        inside, beside = ops[0].encode(hidden, None), ops[1].encode(other, None)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        log_sums = hidden.new_empty((2, len(hidden)), dtype=wide)
        for start in range(0, len(hidden), split.chunk):
            rows = slice(start, start + split.chunk)
            ours = split.logits(ops[0], tuple(part[rows] for part in inside), weight, wide)
            theirs = split.logits(ops[1], tuple(part[rows] for part in beside), other_weight, wide)
            log_sums[:, rows] = _log_sums(torch.stack((ours, theirs)), split.axis)
            ours, theirs = (x - own.unsqueeze(1) for x, own in zip((ours, theirs), log_sums[:, rows], strict=True))
            farther = theirs - ours
            farther[:, split.padding(weight)] = 0
            found = farther.mul_(theirs.exp_()).sum(1)
            if split.axis.size > 1:
                dist.all_reduce(found, group=split.axis.group)
            losses[rows] = found
        ctx.save_for_backward(weight, other_weight, log_sums, *inside, *beside)
        ctx.ops, ctx.split, ctx.number, ctx.dtype = ops, split, len(inside), hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, other_weight, log_sums, *both = ctx.saved_tensors
        inside, beside, split, wide = both[: ctx.number], both[ctx.number :], ctx.split, log_sums.dtype
        op, other_op = ctx.ops
        grad_hidden = weight.new_empty((len(grad), weight.shape[1]), dtype=ctx.dtype)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for start in range(0, len(grad), split.chunk):
            rows = slice(start, start + split.chunk)
            chunk = tuple(part[rows] for part in inside)
            ours = split.logits(op, chunk, weight, wide)
            theirs = split.logits(other_op, tuple(part[rows] for part in beside), other_weight, wide)
            own, their = (one.unsqueeze(1) for one in log_sums[:, rows])
            slope = (ours - own).exp_().sub_((theirs - their).exp_())
            slope = slope.mul_(grad[rows].unsqueeze(1) / split.temperature).to(ctx.dtype)
            grad_hidden[rows] = op.input_gradient(slope, weight)
            op.add_weight_gradient(grad_weight, slope, chunk, weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _log_sums(logits: Tensor, axis: Axis) -> Tensor:
    """[2, T, V/tp] -> [2, T]: log of the sums of exponentials over the whole vocabulary."""
    peak = max_over(logits.amax(-1), axis)
    total = (logits - peak.unsqueeze(-1)).exp_().sum(-1)
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return total.log_().add_(peak)


def vocab_parallel_linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    other: Tensor,
    other_weight: Tensor,
    *,
    ctx: ParallelContext,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    ops: tuple[LinearOp, LinearOp] = (PLAIN, PLAIN),
) -> Tensor:
    """Kullback-Leibler divergence of ``softmax(hidden @ weight^T / temperature)`` from the same of ``other``, whose
    predictions are taken as they are (Hinton et al., arXiv 1503.02531).

    Args:
        hidden: [T, h], the same on every tp rank and inside a tensor-parallel region: the gradient returned for it is
            this rank's partial sum.
        weight: [padded vocab / tp, h].
        other, other_weight: likewise, of another width or the same; they get no gradient.
        vocab_size: true size; the padding rows behind it take no part.
        chunk_tokens: rows of logits that exist at once; None: as the device has room.
        ops: compute the logits of the one and the other, and the gradients of the first.

    Returns:
        Nats of each token, [T] in fp32 (fp64 for fp64 input), the same on every tp rank; at least 0, up to rounding.
    """
    chunk = chunk_tokens or chunk_rows(hidden.device.type, 2 * weight.shape[0])
    split = _Split(ctx.tp, vocab_size, temperature, chunk)
    return _LinearDivergence.apply(hidden, weight, other.detach(), other_weight.detach(), ops, split)
