"""The output head fused with a vocabulary-parallel cross-entropy, in token chunks: full logits never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.linear_op import PLAIN, LinearOp

CHUNK_TOKENS = 1024  # rows of logits that exist at once


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: per-token loss, with all-reduces of [chunk] maxima and sums. Backward: local gradients, no collective.

    The softmax is computed again in the backward pass from the saved log-sum-exp, so memory is one chunk of logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, op: LinearOp, axis: Axis, vocab_size: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        inside = op.encode(hidden, None)
        first_row = axis.rank * weight.shape[0]
        valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = hidden.new_empty(labels.shape, dtype=wide)
        log_sums = torch.empty_like(losses)
        correct = labels.new_empty(labels.shape, dtype=torch.bool)
        for start in range(0, labels.numel(), chunk):
            rows = slice(start, start + chunk)
            logits = op.forward(tuple(part[rows] for part in inside), weight).to(wide)
            logits[:, valid_rows:] = float("-inf")
            target, mine = _own_labels(labels[rows], first_row, valid_rows)
            picked = logits.gather(1, target.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
            peak = max_over(logits.amax(dim=1), axis)
            # exp in place: the chunk's logits are not needed again
            total = logits.sub_(peak.unsqueeze(1)).exp_().sum(dim=1)
            if axis.size > 1:
                both = torch.stack((total, picked))
                dist.all_reduce(both, group=axis.group)
                total, picked = both.unbind()
            log_sums[rows] = peak + total.log()
            losses[rows] = log_sums[rows] - picked
            correct[rows] = picked >= peak
        ctx.save_for_backward(weight, labels, log_sums, *inside)
        ctx.op, ctx.first_row, ctx.valid_rows, ctx.chunk, ctx.dtype = op, first_row, valid_rows, chunk, hidden.dtype
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight, labels, log_sums, *inside = ctx.saved_tensors
        grad_hidden = weight.new_empty((len(labels), weight.shape[1]), dtype=ctx.dtype)
        grad_weight = torch.zeros_like(weight, dtype=log_sums.dtype)
        for start in range(0, labels.numel(), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            chunk = tuple(part[rows] for part in inside)
            logits = ctx.op.forward(chunk, weight).to(log_sums.dtype)
            logits[:, ctx.valid_rows :] = float("-inf")
            dlogits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_()
            target, mine = _own_labels(labels[rows], ctx.first_row, ctx.valid_rows)
            dlogits.scatter_add_(1, target.unsqueeze(1), -mine.to(logits.dtype).unsqueeze(1))
            dlogits = dlogits.mul_(grad[rows].unsqueeze(1)).to(ctx.dtype)
            grad_hidden[rows] = ctx.op.input_gradient(dlogits, weight)
            ctx.op.add_weight_gradient(grad_weight, dlogits, chunk, weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _own_labels(labels: Tensor, first_row: int, valid_rows: int) -> tuple[Tensor, Tensor]:
    """Labels as local row numbers (0 where another rank holds them) and whether this rank holds them."""
    local = labels - first_row
    mine = (local >= 0) & (local < valid_rows)
    return local.masked_fill(~mine, 0), mine


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: ParallelContext,
    vocab_size: int,
    chunk_tokens: int = CHUNK_TOKENS,
    op: LinearOp = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``softmax(hidden @ weight^T)`` over a vocabulary split over tp.

    Args:
        hidden: [T, h], the same on every tp rank and inside a tensor-parallel region: the gradient returned for it is
            this rank's partial sum.
        weight: [padded vocab / tp, h].
        labels: int64 [T], global token ids below ``vocab_size``.
        vocab_size: true size; the padding rows behind it take no part in the softmax.
        chunk_tokens: rows of logits that exist at once.
        op: computes the logits and their gradients.

    Returns:
        The loss of each token in nats, [T] in fp32 (fp64 for fp64 input), and whether the label had the largest
        logit, bool [T] (no gradient). Both are the same on every tp rank.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden [T, h] and labels [T], got {tuple(hidden.shape)} and {tuple(labels.shape)}")
    return _LinearCrossEntropy.apply(hidden, weight, labels, op, ctx.tp, vocab_size, chunk_tokens)
