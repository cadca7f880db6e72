"""Softmax attention over a ring of ranks (Liu et al., arXiv 2310.01889): keys and values travel, queries stay.

A rank never holds more than its own keys and values, those it works on and those on their way to it. Partial results
are merged by their log-sum-exp ("online softmax", Milakov & Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.parallel.context_parallel import ContextShards, pass_on, ring

ROWS_AT_ONCE = 1024  # of queries, whose scores against one chunk of keys exist at once


def ring_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shards: ContextShards) -> Tensor:
    """Attention of this rank's queries to all tokens of the sequence.

    Args:
        query: [b, heads, s / cp, d].
        key, value: [b, groups, s / cp, d], this rank's.
        mask: bool [b or 1, 1, s / cp, s], true where a query may see a key; causal, and every query sees itself.
        shards: which chunks they are.

    Returns:
        [b, heads, s / cp, d].
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    return _RingAttention.apply(grouped, torch.stack([key, value]), mask.unsqueeze(1), shards).flatten(1, 2)


def _tiles(shards: ContextShards, owner: int, mask: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of this rank's queries, rows of the keys of rank ``owner``, mask) where one may see the other.

    A chunk of queries meets its own keys before any others, so that no row is ever without a visible key.
    """
    chunk, theirs = mask.shape[-2] // 2, shards.chunks_of(owner)
    for at, number in enumerate(shards.chunks):
        for place, seen in sorted(enumerate(theirs), key=lambda item: -item[1]):
            if seen > number:
                continue
            keys, columns = slice(place * chunk, (place + 1) * chunk), slice(seen * chunk, (seen + 1) * chunk)
            for first in range(0, chunk, ROWS_AT_ONCE):
                rows = slice(at * chunk + first, at * chunk + min(first + ROWS_AT_ONCE, chunk))
                yield rows, keys, mask[..., rows, columns]


class _RingAttention(torch.autograd.Function):
    """Forward: attention; keys and values pass every rank once. Backward: they do so again, and their gradients with
    them, which arrive at home complete. Products and sums are in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, mask: Tensor, shards: ContextShards) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5
        out = torch.zeros(query.shape, dtype=wide, device=query.device)
        log_sum = torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
        for owner, block in ring(key_value, shards.axis):
            key, value = block.to(wide).unsqueeze(3)  # [b, groups, 1, s / cp, d]
            for rows, keys, visible in _tiles(shards, owner, mask):
                scores = query[..., rows, :].to(wide) @ key[..., keys, :].transpose(-1, -2) * scale
                scores = scores.masked_fill_(~visible, float("-inf"))
                before = log_sum[..., rows]
                after = torch.logaddexp(before, scores.logsumexp(-1))
                weights = scores.sub_(after.unsqueeze(-1)).exp_()
                out[..., rows, :] *= (before - after).exp().unsqueeze(-1)
                out[..., rows, :] += weights @ value[..., keys, :]
                log_sum[..., rows] = after
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key_value, mask, result, log_sum)
        ctx.shards = shards
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, mask, out, log_sum = ctx.saved_tensors
        wide, scale = log_sum.dtype, query.shape[-1] ** -0.5
        grad = grad.to(wide)
        along = (grad * out).sum(-1, keepdim=True)
        dquery = torch.zeros(query.shape, dtype=wide, device=query.device)
        dblock = torch.zeros(key_value.shape, dtype=wide, device=query.device)
        for owner, block in ring(key_value, ctx.shards.axis):
            key, value = block.to(wide).unsqueeze(3)
            for rows, keys, visible in _tiles(ctx.shards, owner, mask):
                own, dout = query[..., rows, :].to(wide), grad[..., rows, :]
                scores = own @ key[..., keys, :].transpose(-1, -2) * scale
                weights = scores.masked_fill_(~visible, float("-inf")).sub_(log_sum[..., rows].unsqueeze(-1)).exp_()
                dscores = dout @ value[..., keys, :].transpose(-1, -2)
                dscores = dscores.sub_(along[..., rows, :]).mul_(weights).mul_(scale)
                dquery[..., rows, :] += dscores @ key[..., keys, :]
                # The heads of a group share its keys and values.
                dblock[0][..., keys, :] += (dscores.transpose(-1, -2) @ own).sum(2)
                dblock[1][..., keys, :] += (weights.transpose(-1, -2) @ dout).sum(2)
            dblock = pass_on(dblock, ctx.shards.axis).wait()
        return dquery.to(query.dtype), dblock.to(key_value.dtype), None, None
