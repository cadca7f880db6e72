"""Softmax attention over a ring of ranks (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

A rank never holds more than its own keys and values, those it works on and those on their way to it: its memory is
linear in the sequence length. What its queries make of each block of keys is one call of the kernel, which takes them
as segments (:mod:`megaforge.kernels.attention.segments`); parts are merged by their log-sum-exp ("online softmax",
Milakov & Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.attention import attention_gradients, attention_with_lse
from megaforge.parallel.context_parallel.shard import ContextParallelShard, pass_on, ring

Segments = Callable[[range, range], Tensor]


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, shards: ContextParallelShard
) -> Tensor:
    """Causal attention of this rank's queries to all tokens of their document.

    Args:
        query: [b, heads, s / cp, d].
        key, value: [b, groups, s / cp, d], this rank's.
        segments: what queries at some places of the whole sequences see of keys at some places.
        shards: which chunks they are.

    Returns:
        [b, heads, s / cp, d].
    """
    result: Tensor = _Ring.apply(query, torch.stack([key, value]), segments, shards)
    return result


def _tiles(
    segments: Segments, shards: ContextParallelShard, owner: int, length: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of this rank's queries, rows of the keys of rank ``owner``, what the ones see of the others), a chunk's own
    keys first; nothing where nothing is seen. ``length``: tokens of a rank."""
    size, theirs = length // len(shards.chunks), shards.chunks_of(owner)
    for at, number in enumerate(shards.chunks):
        for place, seen in sorted(enumerate(theirs), key=lambda item: -item[1]):
            found = segments(*(range(chunk * size, (chunk + 1) * size) for chunk in (number, seen)))
            if seen <= number and len(found):
                yield slice(at * size, (at + 1) * size), slice(place * size, (place + 1) * size), found


class _Ring(torch.autograd.Function):
    """Forward: attention; keys and values pass every rank once. Backward: they do so again, and their gradients with
    them, which arrive at home complete. Parts are summed in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, segments: Segments, shards: ContextParallelShard) -> Tensor:
        out = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
        lse = out.new_full(query.shape[:-1], float("-inf"))
        for owner, block in ring(key_value, shards.axis):
            for rows, keys, found in _tiles(segments, shards, owner, query.shape[2]):
                part, own = attention_with_lse(query[:, :, rows], block[0][:, :, keys], block[1][:, :, keys], found)
                before = lse[:, :, rows]
                after = torch.logaddexp(before, own)
                out[:, :, rows] *= (before - after).exp().unsqueeze(-1)
                out[:, :, rows] += part.mul_((own - after).exp().unsqueeze(-1))
                lse[:, :, rows] = after
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key_value, result, lse)
        ctx.segments, ctx.shards = segments, shards
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, out, lse = ctx.saved_tensors
        dquery, dblock = lse.new_zeros(query.shape), lse.new_zeros(key_value.shape)
        for owner, block in ring(key_value, ctx.shards.axis):
            for rows, keys, found in _tiles(ctx.segments, ctx.shards, owner, query.shape[2]):
                own = (grad[:, :, rows], query[:, :, rows], block[0][:, :, keys], block[1][:, :, keys])
                parts = attention_gradients(*own, out[:, :, rows], lse[:, :, rows], found)
                dquery[:, :, rows] += parts[0]
                dblock[0][:, :, keys] += parts[1]
                dblock[1][:, :, keys] += parts[2]
            dblock = pass_on(dblock, ctx.shards.axis).wait()
        return dquery.to(query.dtype), dblock.to(key_value.dtype), None, None
