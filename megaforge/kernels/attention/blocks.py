"""Causal attention in blocks of queries, in torch, on any device and in any type: for where nothing faster is.

The scores of one block exist at a time, and with them the only mask there is. The output and the log-sum-exp of the
scores are kept, and the backward pass computes the scores again (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.device import upload
from megaforge.kernels.attention.segments import Plans, ranges_of

ROWS = 64  # queries of a block: its scores stay in cache


class _Block(NamedTuple):
    """Queries ``first`` to ``end``, and the keys ``low`` to ``high`` that any of them sees."""

    first: int
    end: int
    low: int
    high: int


class _Plan(NamedTuple):
    """Blocks, and the first key and the one after the last that each query sees: int64 [2, b, s]."""

    blocks: list[_Block]
    ranges: Tensor

    def hidden(self, block: _Block) -> Tensor:
        """bool [b, 1, rows, keys]"""
        first, end = self.ranges[:, :, block.first : block.end, None].unbind(0)
        keys = torch.arange(block.low, block.high, device=end.device)
        return ((keys < first) | (keys >= end)).unsqueeze(1)


_plans: Plans[_Plan] = Plans()


def _plan(query: Tensor, segments: Tensor) -> _Plan:
    def make() -> _Plan:
        ranges = ranges_of(segments, query.shape[0], query.shape[2])
        blocks = []
        for first in range(0, query.shape[2], ROWS):
            part = ranges[:, :, first : first + ROWS]
            seen = part[0] < part[1]
            if seen.any():
                low, high = int(part[0][seen].min()), int(part[1][seen].max())
                blocks.append(_Block(first, min(first + ROWS, query.shape[2]), low, high))
        return _Plan(blocks, upload(ranges, query.device))

    return _plans.of(segments, ("blocks", query.device, query.shape[0], query.shape[2], ROWS), make)


class _Scratch:
    """Memory for one block's scores, used again by every block: fresh memory of this size costs page faults."""

    def __init__(self, q: Tensor, plan: _Plan) -> None:
        most = max(((block.end - block.first) * (block.high - block.low) for block in plan.blocks), default=0)
        self.type = torch.promote_types(q.dtype, torch.float32)
        size = q.shape[0] * most
        self.wide = [q.new_empty(size, dtype=self.type) for _ in range(2)]
        self.narrow = None if self.type == q.dtype else q.new_empty(size)

    def product(self, rows: Tensor, columns: Tensor, slot: int) -> Tensor:
        """``rows @ columns`` in fp32 (fp64), in the memory ``slot``; forgets what :meth:`rounded` gave."""
        shape = (*rows.shape[:2], columns.shape[2])
        if self.narrow is None:
            return torch.bmm(rows, columns, out=_view(self.wide[slot], shape))
        return _view(self.wide[slot], shape).copy_(torch.bmm(rows, columns, out=_view(self.narrow, shape)))

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in the type of the queries."""
        return x if self.narrow is None else _view(self.narrow, tuple(x.shape)).copy_(x)


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: math.prod(shape)].view(shape)


def _heads_apart(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries times the scale, keys and values as [b * heads, s or t, d]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return [x.flatten(0, 1) for x in (query * query.shape[-1] ** -0.5, key, value)]


def _weights(q: Tensor, k: Tensor, plan: _Plan, block: _Block, scratch: _Scratch) -> Tensor:
    """Scores [b * heads, rows, keys] of a block, -inf where a query may not look."""
    scores = scratch.product(q[:, block.first : block.end], k[:, block.low : block.high].transpose(1, 2), 0)
    hidden = plan.hidden(block)
    scores.view(hidden.shape[0], -1, *scores.shape[1:]).masked_fill_(hidden, float("-inf"))
    return scores


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`megaforge.kernels.attention.native.attention_with_lse`, of any type; fp64 stays so."""
    (q, k, v), plan = _heads_apart(query, key, value), _plan(query, segments)
    scratch = _Scratch(q, plan)
    out = torch.zeros(q.shape, dtype=scratch.type, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=scratch.type, device=q.device)
    for block in plan.blocks:
        scores, rows = _weights(q, k, plan, block, scratch), slice(block.first, block.end)
        peak = scores.amax(dim=-1, keepdim=True)
        # A query that sees nothing has weights of 0, and a sum whose logarithm is -inf.
        weights = scores.sub_(peak.masked_fill(peak == float("-inf"), 0.0)).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse[:, rows] = (peak + total.log()).squeeze(-1)
        sums = torch.bmm(scratch.rounded(weights), v[:, block.low : block.high])
        out[:, rows] = sums / total.masked_fill(total == 0, 1.0)
    return out.view(query.shape), lse.view(query.shape[:3])


def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`megaforge.kernels.attention.native.attention_gradients`, of any type; fp64 stays so."""
    (q, k, v), plan = _heads_apart(query, key, value), _plan(query, segments)
    scratch = _Scratch(q, plan)
    grad, log_sums = grad.to(q.dtype).reshape(q.shape), lse.reshape(*q.shape[:2], 1)
    dq, dk, dv = (torch.zeros(x.shape, dtype=scratch.type, device=q.device) for x in (q, k, v))
    along = (grad.to(scratch.type) * out.reshape(q.shape)).sum(dim=-1, keepdim=True)
    nothing = log_sums == float("-inf")
    for block in plan.blocks:
        rows, keys = slice(block.first, block.end), slice(block.low, block.high)
        scores = _weights(q, k, plan, block, scratch)
        weights = scores.sub_(log_sums[:, rows].masked_fill(nothing[:, rows], 0.0)).exp_()
        dv[:, keys] += torch.bmm(scratch.rounded(weights).transpose(1, 2), grad[:, rows])
        dscores = scratch.product(grad[:, rows], v[:, keys].transpose(1, 2), 1).sub_(along[:, rows]).mul_(weights)
        narrow = scratch.rounded(dscores)
        dq[:, rows] = torch.bmm(narrow, k[:, keys])
        dk[:, keys] += torch.bmm(narrow.transpose(1, 2), q[:, rows])  # q carries the scale
    groups = key.shape[1]
    dk, dv = (x.view(query.shape[0], groups, -1, *x.shape[1:]).sum(2) for x in (dk, dv))
    return dq.mul_(query.shape[-1] ** -0.5).view(query.shape), dk, dv


class BlockwiseAttention(torch.autograd.Function):
    """Within segments: [b, heads, s, d], twice [b, groups, t, d] -> [b, heads, s, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
        out, lse = attention_with_lse(query, key, value, segments)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments = segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = attention_gradients(grad, query, key, value, out, lse, ctx.segments)
        return *(found.to(query.dtype) for found in grads), None


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """As :func:`megaforge.kernels.attention.native.attention`, of any type and on any device."""
    out: Tensor = BlockwiseAttention.apply(query, key, value, segments)
    return out
