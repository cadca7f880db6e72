"""Causal attention some of whose probabilities are dropped: in blocks of queries, on any device.

torch's fused kernels draw their own masks, which depend on the layout; here the caller says which probabilities stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64  # queries of a block, whose scores exist at once
# (first, end) of some queries, and how many keys -> bool [b, heads, queries, keys], which probabilities stay.
Kept = Callable[[int, int, int], Tensor]


class Places(NamedTuple):
    """Where queries and keys are.

    Attributes:
        starts: place of the first query of each of the equal chunks that the queries are.
        queries: int64 [b, s], the document of each query; None: there is one.
        keys: int64 [b, t], likewise of each key.
    """

    starts: tuple[int, ...] = (0,)
    queries: Tensor | None = None
    keys: Tensor | None = None


def dropped_attention(query: Tensor, key: Tensor, value: Tensor, places: Places, kept: Kept, scale: float) -> Tensor:
    """``(dropout(softmax(q k^T / sqrt(d)))) v`` over the earlier tokens of each query's document.

    Args:
        query: [b, heads, s, d].
        key, value: [b, groups, t, d], of the places 0 to t; each group serves heads / groups neighbouring heads.
        places: of the queries.
        kept: which probabilities stay; asked for again in the backward pass.
        scale: what they are multiplied by.

    Returns:
        [b, heads, s, d] of the dtype of ``query``; the softmax is taken in fp32 (fp64 for fp64).
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    return _DroppedAttention.apply(grouped, key, value, places, kept, scale).flatten(1, 2)


class _Block(NamedTuple):
    """Queries ``first`` to ``end``, which see the keys before ``last``, but not those where ``hidden`` is true."""

    first: int
    end: int
    last: int
    hidden: Tensor


def _blocks(places: Places, query: Tensor) -> Iterator[_Block]:
    size = query.shape[-2] // len(places.starts)
    for number, start in enumerate(places.starts):
        for begin in range(0, size, ROWS):
            stop = min(begin + ROWS, size)
            first, end, last = number * size + begin, number * size + stop, start + stop
            rows = torch.arange(start + begin, last, device=query.device)
            hidden = rows[:, None] < torch.arange(last, device=query.device)
            if places.queries is not None and places.keys is not None:
                foreign = places.queries[:, first:end, None] != places.keys[:, None, :last]
                hidden = (foreign | hidden)[:, None, None]
            yield _Block(first, end, last, hidden)


def _scores(query: Tensor, key: Tensor, block: _Block) -> Tensor:
    """[b, groups, heads of a group, rows, keys] in fp32 (fp64), -inf where a query may not look."""
    product = query[..., block.first : block.end, :] @ key[:, :, None, : block.last].transpose(-1, -2)
    wide = product.to(torch.promote_types(query.dtype, torch.float32)) * query.shape[-1] ** -0.5
    return wide.masked_fill_(block.hidden, float("-inf"))


class _DroppedAttention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp of the scores, and computes the scores again in the backward pass (Dao et
    al., arXiv 2205.14135)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, places: Places, kept: Kept, scale: float
    ) -> Tensor:
        out = torch.empty_like(query)
        log_sums = query.new_empty((*query.shape[:-1], 1), dtype=torch.promote_types(query.dtype, torch.float32))
        for block in _blocks(places, query):
            rows = slice(block.first, block.end)
            scores = _scores(query, key, block)
            log_sums[..., rows, :] = total = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(total).exp_() * _factors(kept, block, query, scale)
            out[..., rows, :] = weights.to(query.dtype) @ value[:, :, None, : block.last]
        ctx.save_for_backward(query, key, value, out, log_sums, places.queries, places.keys)
        ctx.starts, ctx.kept, ctx.scale = places.starts, kept, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums, *documents = ctx.saved_tensors
        wide = log_sums.dtype
        along = (grad.to(wide) * out).sum(-1, keepdim=True)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for block in _blocks(Places(ctx.starts, *documents), query):
            rows, dout = slice(block.first, block.end), grad[..., block.first : block.end, :]
            weights = _scores(query, key, block).sub_(log_sums[..., rows, :]).exp_()
            factors = _factors(ctx.kept, block, query, ctx.scale)
            seen = (weights * factors).to(query.dtype)
            grad_value[:, :, : block.last] += (seen.transpose(-1, -2) @ dout).sum(2)
            dweights = (dout @ value[:, :, None, : block.last].transpose(-1, -2)).to(wide) * factors
            dscores = dweights.sub_(along[..., rows, :]).mul_(weights).mul_(query.shape[-1] ** -0.5).to(query.dtype)
            grad_query[..., rows, :] = dscores @ key[:, :, None, : block.last]
            # The heads of a group share its keys and values.
            grad_key[:, :, : block.last] += (dscores.transpose(-1, -2) @ query[..., rows, :]).sum(2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _factors(kept: Kept, block: _Block, query: Tensor, scale: float) -> Tensor:
    """0 or ``scale``, [b, groups, heads of a group, rows, keys]."""
    stays = kept(block.first, block.end, block.last)
    wide = torch.promote_types(query.dtype, torch.float32)
    return (stays.to(wide) * scale).unflatten(1, query.shape[1:3])
