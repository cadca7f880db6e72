"""Causal attention in blocks of queries, for bf16 on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # queries of a block: its scores stay in cache


class _Scratch:
    """Memory for one block's scores, used again by every block: fresh memory of this size costs page faults."""

    def __init__(self, q: Tensor) -> None:
        self.wide = [q.new_empty(q.shape[0] * ROWS * q.shape[1], dtype=torch.float32) for _ in range(2)]
        self.narrow = torch.empty_like(self.wide[0], dtype=q.dtype)

    def product(self, rows: Tensor, columns: Tensor, slot: int) -> Tensor:
        """``rows @ columns`` in fp32, in the memory ``slot``; forgets what :meth:`rounded` gave."""
        shape = (*rows.shape[:2], columns.shape[2])
        raw = torch.bmm(rows, columns, out=_view(self.narrow, shape))
        return _view(self.wide[slot], shape).copy_(raw)

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in the narrow type."""
        return _view(self.narrow, tuple(x.shape)).copy_(x)


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: math.prod(shape)].view(shape)


class BlockwiseAttention(torch.autograd.Function):
    """Blocks of query rows against all keys up to their end. Keeps the output and the log-sum-exp of the scores, and
    computes the scores again in the backward pass (Dao et al., arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        shape, scale = query.shape, query.shape[-1] ** -0.5
        q, k, v = ((t.reshape(-1, *shape[2:])) for t in (query * scale, key, value))
        out = torch.empty_like(q)
        log_sums = q.new_empty((*q.shape[:2], 1), dtype=torch.float32)
        scratch = _Scratch(q)
        for begin, end in _blocks(shape[2]):
            scores = _scores(q, k, begin, end, mask, shape[1], scratch)
            peak = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            log_sums[:, begin:end] = peak + total.log()
            out[:, begin:end] = torch.bmm(scratch.rounded(weights), v[:, :end]) / total
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.mask, ctx.shape, ctx.scale = mask, shape, scale
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sums = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        along = (grad.float() * out).sum(dim=-1, keepdim=True)
        scratch = _Scratch(q)
        for begin, end in _blocks(q.shape[1]):
            rows = grad[:, begin:end]
            weights = _scores(q, k, begin, end, ctx.mask, ctx.shape[1], scratch).sub_(log_sums[:, begin:end]).exp_()
            grad_v[:, :end] += torch.bmm(scratch.rounded(weights).transpose(1, 2), rows)
            grad_scores = scratch.product(rows, v[:, :end].transpose(1, 2), 1).sub_(along[:, begin:end]).mul_(weights)
            narrow = scratch.rounded(grad_scores)
            grad_q[:, begin:end] = torch.bmm(narrow, k[:, :end])
            grad_k[:, :end] += torch.bmm(narrow.transpose(1, 2), q[:, begin:end])  # q carries the scale
        shape = ctx.shape
        grads = (grad_q.mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype))
        return grads[0].view(shape), grads[1].view(shape), grads[2].view(shape), None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, ROWS):
        yield begin, min(begin + ROWS, length)


def _scores(q: Tensor, k: Tensor, begin: int, end: int, mask: Tensor | None, heads: int, scratch: _Scratch) -> Tensor:
    """fp32 scores [b * heads, end - begin, end] of a block of rows, -inf where a query may not look."""
    scores = scratch.product(q[:, begin:end], k[:, :end].transpose(1, 2), 0)
    if mask is None:
        later = torch.full((end - begin, end - begin), float("-inf"), device=q.device).triu(1)
        scores[:, :, begin:].add_(later)
    else:
        tile = mask[:, :, begin:end, :end]
        scores.view(-1, heads, *scores.shape[1:]).masked_fill_(~tile, float("-inf"))
    return scores
