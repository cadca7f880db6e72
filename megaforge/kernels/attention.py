"""Causal softmax attention: one face over torch's fused kernels and, for 16-bit tensors on a CPU, a blockwise form.

torch's fused CPU kernel makes little of the CPU's 16-bit matrix products; the blockwise form is made of them. Both need
memory linear in the sequence length.

On a GPU packed documents go through flash attention for sequences of different lengths (:func:`takes_documents`), which
skips what a mask hides and has no mask. Where that cannot be, a mask leaves torch the memory-efficient kernel, which
refuses ``enable_gqa`` (up to 2.13): the keys and values of a group are repeated, or scores of [b, heads, s, t] would
exist in fp32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

ROWS = 64  # queries of a block: its scores stay in cache
_VARLEN: Callable[..., Any] | None = varlen_attn


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of b sequences of s tokens, taken as one row of b * s tokens.

    Attributes:
        bounds: int32 [documents + 1], where each begins, and the end of the last: from 0 to b * s.
        longest: tokens of the longest.
    """

    bounds: Tensor
    longest: int


def takes_documents(query: Tensor) -> bool:
    """Whether :func:`causal_attention` takes :class:`PackedDocuments` for ``query``: 16 bits wide, on a GPU."""
    if query.device.type != "cuda" or _VARLEN is None:
        return False
    return flash_serves(query.dtype, query.shape[-1], torch.cuda.get_device_capability(query.device))


def flash_serves(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether torch's flash kernels, called without the padding that ``scaled_dot_product_attention`` adds, run both
    ways on a GPU of this compute capability."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    return narrow and head_dim % 8 == 0 and head_dim <= 192 and capability >= (8, 0)


def repeats_groups(device_type: str, masked: bool) -> bool:
    """Whether keys and values that several heads share are repeated for each of them; see above."""
    return device_type == "cuda" and masked


def taken_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as the kernels of its device take it: on a GPU not bool but what is added to scores of ``dtype``, which
    ``scaled_dot_product_attention`` would make of it at every call."""
    return additive_mask(mask, dtype) if mask.device.type == "cuda" else mask


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` is true, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, documents: PackedDocuments | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over what each query may see.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, t, d]; each group serves heads / groups neighbouring heads.
        value: [b, groups, t, d].
        mask: bool, broadcastable to [b, heads, s, t], true where a query sees a key; it sees at least one. On a GPU
            also in the form of :func:`taken_mask`. None: token i sees tokens 0 to i (then s = t).
        documents: instead of a mask, where :func:`takes_documents`: a token sees those before it in its document
            (then s = t).

    Returns:
        [b, heads, s, d] of the dtype of ``query``; the softmax is taken in fp32 (fp64 for fp64).
    """
    if documents is not None:
        return _within_documents(query, key, value, documents)
    grouped = key.shape[1] != query.shape[1]
    kind = query.device.type
    blockwise = kind == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] == key.shape[2]
    if grouped and (blockwise or repeats_groups(kind, mask is not None)):
        repeats, grouped = query.shape[1] // key.shape[1], False
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if blockwise:
        return _BlockwiseAttention.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def _within_documents(query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
    """torch's ``varlen_attn``, whose words for causal and for groups differ between 2.11 and 2.13."""
    assert _VARLEN is not None
    words = inspect.signature(_VARLEN).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in words else {"is_causal": True}
    batch, heads, length, width = query.shape
    rows = [x.transpose(1, 2).reshape(batch * length, -1, width) for x in (query, key, value)]
    if key.shape[1] != heads:
        if "enable_gqa" in words:
            options["enable_gqa"] = True
        else:
            rows[1:] = [x.repeat_interleave(heads // key.shape[1], dim=1) for x in rows[1:]]
    bounds, longest = documents.bounds, documents.longest
    out: Tensor = _VARLEN(*rows, bounds, bounds, longest, longest, **options)
    return out.view(batch, length, heads, width).transpose(1, 2)


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


class _BlockwiseAttention(torch.autograd.Function):
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
