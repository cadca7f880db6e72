"""Softmax attention over a ring of ranks (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

A rank never holds more than its own keys and values, those it works on and those on their way to it, and the mask of
one tile of scores at a time: its memory is linear in the sequence length. Partial results are merged by their
log-sum-exp ("online softmax", Milakov & Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.parallel.context_parallel.shard import ContextParallelShard, pass_on, ring

ROWS_AT_ONCE = 1024  # of queries, whose scores against one chunk of keys exist at once


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, shards: ContextParallelShard
) -> Tensor:
    """Causal attention of this rank's queries to all tokens of their document.

    Args:
        query: [b, heads, s / cp, d].
        key, value: [b, groups, s / cp, d], this rank's.
        documents: int64 [b, s], the document of each token of the whole sequence; None where there is one.
        shards: which chunks they are.

    Returns:
        [b, heads, s / cp, d].
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    return _RingAttention.apply(grouped, torch.stack([key, value]), documents, shards).flatten(1, 2)


def _tiles(
    shards: ContextParallelShard, owner: int, query: Tensor, documents: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(rows of this rank's queries, rows of the keys of rank ``owner``, which are hidden from which: bool, None if
    none are) where one may see the other.

    A chunk of queries meets its own keys before any others, so that no row is ever without a visible key.
    """
    chunk, theirs = query.shape[-2] // len(shards.chunks), shards.chunks_of(owner)
    for at, number in enumerate(shards.chunks):
        for place, seen in sorted(enumerate(theirs), key=lambda item: -item[1]):
            if seen > number:
                continue
            keys, columns = slice(place * chunk, (place + 1) * chunk), range(seen * chunk, (seen + 1) * chunk)
            for first in range(0, chunk, ROWS_AT_ONCE):
                last = min(first + ROWS_AT_ONCE, chunk)
                rows = range(number * chunk + first, number * chunk + last)
                hidden = _hidden(rows, columns, documents, query.device)
                yield slice(at * chunk + first, at * chunk + last), keys, hidden


def _hidden(rows: range, columns: range, documents: Tensor | None, device: torch.device) -> Tensor | None:
    """Bool, broadcastable to [b, groups, heads of a group, rows, columns]: later keys, and those of other documents.
    Rows and columns count from the beginning of the whole sequence."""
    hidden = None
    if rows.start < columns.stop - 1:
        places = torch.arange(rows.start, rows.stop, device=device)
        hidden = places[:, None] < torch.arange(columns.start, columns.stop, device=device)
    if documents is None:
        return hidden
    own, other = documents[:, rows.start : rows.stop, None], documents[:, None, columns.start : columns.stop]
    foreign = own != other
    return (foreign if hidden is None else foreign | hidden)[:, None, None]


class _RingAttention(torch.autograd.Function):
    """Forward: attention; keys and values pass every rank once. Backward: they do so again, and their gradients with
    them, which arrive at home complete. Products and sums are in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, documents: Tensor | None, shards: ContextParallelShard
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5
        out = torch.zeros(query.shape, dtype=wide, device=query.device)
        log_sum = torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
        for owner, block in ring(key_value, shards.axis):
            key, value = block.to(wide).unsqueeze(3)  # [b, groups, 1, s / cp, d]
            for rows, keys, hidden in _tiles(shards, owner, query, documents):
                scores = query[..., rows, :].to(wide) @ key[..., keys, :].transpose(-1, -2) * scale
                if hidden is not None:
                    scores.masked_fill_(hidden, float("-inf"))
                before = log_sum[..., rows]
                after = torch.logaddexp(before, scores.logsumexp(-1))
                weights = scores.sub_(after.unsqueeze(-1)).exp_()
                out[..., rows, :] *= (before - after).exp().unsqueeze(-1)
                out[..., rows, :] += weights @ value[..., keys, :]
                log_sum[..., rows] = after
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key_value, documents, result, log_sum)
        ctx.shards = shards
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, documents, out, log_sum = ctx.saved_tensors
        wide, scale = log_sum.dtype, query.shape[-1] ** -0.5
        grad = grad.to(wide)
        along = (grad * out).sum(-1, keepdim=True)
        dquery = torch.zeros(query.shape, dtype=wide, device=query.device)
        dblock = torch.zeros(key_value.shape, dtype=wide, device=query.device)
        for owner, block in ring(key_value, ctx.shards.axis):
            key, value = block.to(wide).unsqueeze(3)
            for rows, keys, hidden in _tiles(ctx.shards, owner, query, documents):
                own, dout = query[..., rows, :].to(wide), grad[..., rows, :]
                scores = own @ key[..., keys, :].transpose(-1, -2) * scale
                if hidden is not None:
                    scores.masked_fill_(hidden, float("-inf"))
                weights = scores.sub_(log_sum[..., rows].unsqueeze(-1)).exp_()
                dscores = dout @ value[..., keys, :].transpose(-1, -2)
                dscores = dscores.sub_(along[..., rows, :]).mul_(weights).mul_(scale)
                dquery[..., rows, :] += dscores @ key[..., keys, :]
                # The heads of a group share its keys and values.
                dblock[0][..., keys, :] += (dscores.transpose(-1, -2) @ own).sum(2)
                dblock[1][..., keys, :] += (weights.transpose(-1, -2) @ dout).sum(2)
            dblock = pass_on(dblock, ctx.shards.axis).wait()
        return dquery.to(query.dtype), dblock.to(key_value.dtype), None, None
