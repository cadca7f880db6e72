"""The output head fused with a vocabulary-parallel cross-entropy, in token chunks: full logits never exist at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.kernels.cross_entropy import score_labels
from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.linear_op import PLAIN, LinearOp
from megaforge.parallel.pipeline.split_backward import is_needed_again

CHUNK_TOKENS = 1024  # rows of logits that exist at once on a CPU, whose caches they should not leave far behind
# On a GPU, where each chunk's gradient is added to the whole matrix's in its memory: more rows, as far as 1 GiB of fp32
# logits goes. The meta device stands for GPUs.
_MOST_TOKENS, _MOST_LOGITS = 8192, 1 << 28


def chunk_rows(device_type: str, columns: int) -> int:
    """Rows of logits that exist at once, of ``columns`` each."""
    if device_type == "cpu":
        return CHUNK_TOKENS
    return min(_MOST_TOKENS, max(CHUNK_TOKENS, _MOST_LOGITS // max(columns, 1)))


class ScoredLabels(NamedTuple):
    """What a head makes of T labels; the same on every tp rank.

    Attributes:
        losses: cross-entropy of each in nats, [T] in fp32 (fp64 for fp64 input).
        correct: whether it had the largest logit, bool [T]; no gradient.
        total: the sum over labels of weight * cross-entropy, 0-dim; None where no weights were given.
    """

    losses: Tensor
    correct: Tensor
    total: Tensor | None


class _Head(NamedTuple):
    """How logits are formed, and on how many rows at once."""

    op: LinearOp
    axis: Axis
    vocab_size: int
    chunk: int


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward: per-token loss, with all-reduces of [chunk] maxima and sums. Backward: local gradients, no collective.

    Where weights are given, the gradients of the weighted sum are formed in the forward pass, from logits that are
    there (as in Liger Kernel, Hsu et al., arXiv 2410.10989); the backward pass multiplies them by one number. What else
    is asked of it, the gradient of single losses, it computes from logits that it forms again, with the saved
    log-sum-exp. Memory is one chunk of logits in either case.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, head: _Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        op, axis = head.op, head.axis
        assert hidden.shape[:-1] == labels.shape, "a label for each row"
        inside = op.encode(hidden, None)
        first_row = axis.rank * weight.shape[0]
        valid_rows = min(max(head.vocab_size - first_row, 0), weight.shape[0])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = hidden.new_empty(labels.shape, dtype=wide)
        log_sums = torch.empty_like(losses)
        correct = labels.new_empty(labels.shape, dtype=torch.bool)
        formed = None
        if weights is not None and any(ctx.needs_input_grad[:2]):
            formed = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        for start in range(0, labels.numel(), head.chunk):
            rows = slice(start, start + head.chunk)
            chunk = tuple(part[rows] for part in inside)
            scores = score_labels(op.forward(chunk, weight), labels[rows] - first_row, valid_rows)
            picked, peak = scores.picked, max_over(scores.peak, axis)
            total = scores.sums(peak)
            if axis.size > 1:
                both = torch.stack((total, picked))
                dist.all_reduce(both, group=axis.group)
                total, picked = both.unbind()
            log_sums[rows] = peak + total.log()
            losses[rows] = log_sums[rows] - picked
            correct[rows] = picked >= peak
            if formed is not None:
                assert weights is not None
                dlogits = scores.gradients_of_sum(total, weights[rows])
                _add_gradients(formed, rows, dlogits.to(hidden.dtype), chunk, weight, op)
        ctx.save_for_backward(weight, labels, weights, log_sums, *inside)
        ctx.head, ctx.rows, ctx.dtype, ctx.formed = head, (first_row, valid_rows), hidden.dtype, formed
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        return losses, correct, losses.new_zeros(()) if weights is None else (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, labels, weights, log_sums, *inside = ctx.saved_tensors
        found = None
        if grad_total is not None and weights is not None:
            if ctx.formed is None:  # given away, or never formed
                grad = grad_total * weights if grad is None else grad + grad_total * weights
            elif is_needed_again(torch._C._current_autograd_node()):
                found = tuple(part * grad_total for part in ctx.formed)
            else:
                found, ctx.formed = tuple(part.mul_(grad_total) for part in ctx.formed), None
        if grad is not None:
            more = _gradients(ctx, grad, weight, labels, log_sums, tuple(inside))
            found = more if found is None else tuple(one + other for one, other in zip(found, more, strict=True))
        if found is None:
            return (None,) * 5
        return found[0], found[1].to(weight.dtype), None, None, None


def _gradients(
    ctx: Any, grad: Tensor, weight: Tensor, labels: Tensor, log_sums: Tensor, inside: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Those of ``hidden`` and, in the type of sums, of ``weight``, from those of single losses."""
    op, (first_row, valid_rows) = ctx.head.op, ctx.rows
    found = (
        weight.new_empty((len(labels), weight.shape[1]), dtype=ctx.dtype),
        torch.zeros_like(weight, dtype=log_sums.dtype),
    )
    for start in range(0, labels.numel(), ctx.head.chunk):
        rows = slice(start, start + ctx.head.chunk)
        chunk = tuple(part[rows] for part in inside)
        scores = score_labels(op.forward(chunk, weight), labels[rows] - first_row, valid_rows)
        dlogits = scores.gradients(log_sums[rows], grad[rows])
        _add_gradients(found, rows, dlogits.to(ctx.dtype), chunk, weight, op)
    return found


def _add_gradients(
    to: tuple[Tensor, Tensor], rows: slice, dlogits: Tensor, chunk: tuple[Tensor, ...], weight: Tensor, op: LinearOp
) -> None:
    to[0][rows] = op.input_gradient(dlogits, weight)
    op.add_weight_gradient(to[1], dlogits, chunk, weight)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ctx: ParallelContext,
    vocab_size: int,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    op: LinearOp = PLAIN,
) -> ScoredLabels:
    """Cross-entropy of ``softmax(hidden @ weight^T)`` over a vocabulary split over tp.

    Args:
        hidden: [T, h], the same on every tp rank and inside a tensor-parallel region: the gradient returned for it is
            this rank's partial sum.
        weight: [padded vocab / tp, h].
        labels: int64 [T], global token ids below ``vocab_size``.
        vocab_size: true size; the padding rows behind it take no part in the softmax.
        weights: of the labels in their sum, [T] in the type of the losses; no gradient. The gradients of the sum are
            then formed here, and ``weight``'s kept in the type of the losses until the backward pass: give them where
            that follows at once.
        chunk_tokens: rows of logits that exist at once; None: as the device has room.
        op: computes the logits and their gradients.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden [T, h] and labels [T], got {tuple(hidden.shape)} and {tuple(labels.shape)}")
    chunk = chunk_tokens or chunk_rows(hidden.device.type, weight.shape[0])
    found = _LinearCrossEntropy.apply(hidden, weight, labels, weights, _Head(op, ctx.tp, vocab_size, chunk))
    losses, correct, total = found
    return ScoredLabels(losses, correct, None if weights is None else total)
