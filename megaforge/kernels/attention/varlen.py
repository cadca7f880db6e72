"""Attention within segments by flash attention for sequences of different lengths, ``torch.nn.attention.varlen``: on
GPUs, in 16 bits. What a query does not see is skipped, and there is no mask.

Each segment is a sequence of its own, whose queries and keys stand in two rows of tokens, one segment after the other;
they are put there where they do not stand so already. The kernel's causal form lets the last query see the last key,
and every other one as many fewer; without it each query sees all keys. The words for both, and for groups, differ
between torch 2.11 and 2.13.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.device import IS_HIP, upload
from megaforge.kernels.attention.segments import FEW, Plans


def _of_torch() -> tuple[Callable[..., Any] | None, Any]:
    """What newer releases have."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None, None
    return varlen_attn, AuxRequest


VARLEN, AuxRequest = _of_torch()
BACKWARD: Callable[..., Any] | None = getattr(torch.ops.torch_attn, "_varlen_attn_backward", None)
OLDEST = (8, 0)  # compute capability of the GPUs that plans stand for


def flash_serves(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether torch's flash kernels, called without the padding that ``scaled_dot_product_attention`` adds, run both
    ways on a GPU of this compute capability."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    return narrow and head_dim % 8 == 0 and head_dim <= 192 and capability >= (8, 0)


def why_not(query: Tensor) -> str | None:
    """Why flash attention does not take ``query`` [b, heads, s, d], on a GPU or on meta; None: it does."""
    if VARLEN is None:
        return "is not in this torch"
    on_meta = query.device.type == "meta"
    if IS_HIP and not on_meta:
        return "is not tried on ROCm"
    capability = OLDEST if on_meta else torch.cuda.get_device_capability(query.device)
    if flash_serves(query.dtype, query.shape[-1], capability):
        return None
    return f"does not take {query.dtype} in heads of {query.shape[-1]} on compute capability {capability}"


class _Plan(NamedTuple):
    """How segments stand in rows.

    Attributes:
        queries, keys: int64, which of the b * s queries and b * t keys stand in the row; None: all, as they are.
        query_bounds, key_bounds: int32 [segments + 1], where each begins, and the end of the last.
        longest: of the queries, and of the keys, of a segment.
        causal: whether the last query of each sees all of its keys, and others fewer; else all see all.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    longest: tuple[int, int]
    causal: bool


_plans: Plans[_Plan | None] = Plans()


def _plan(query: Tensor, key: Tensor, segments: Tensor) -> _Plan | None:
    """None where the segments are neither causal nor whole."""

    def make() -> _Plan | None:
        batch, begin, rows, first, columns, ahead = segments.unbind(1)
        causal, full = ahead == columns - rows, ahead >= columns - 1
        if not (causal.all() or full.all()):
            return None

        def part(start: Tensor, count: Tensor, length: int) -> tuple[Tensor | None, Tensor]:
            bounds = torch.cat([count.new_zeros(1), count.cumsum(0)])
            offset = (batch * length + start - bounds[:-1]).repeat_interleave(count)
            index = offset + torch.arange(int(bounds[-1]))
            in_place = len(index) == query.shape[0] * length and bool((index == torch.arange(len(index))).all())
            return None if in_place else upload(index, query.device), upload(bounds.int(), query.device)

        queries, query_bounds = part(begin, rows, query.shape[2])
        keys, key_bounds = part(first, columns, key.shape[2])
        return _Plan(queries, keys, query_bounds, key_bounds, (int(rows.max()), int(columns.max())), bool(causal.all()))

    if len(segments) == 0:
        return None
    return _plans.of(segments, ("varlen", query.device, query.shape[0], query.shape[2], key.shape[2]), make)


def takes(query: Tensor, key: Tensor, segments: Tensor) -> bool:
    """Whether :func:`attention` takes these, where :func:`why_not` has nothing against it."""
    many = query.shape[2] == key.shape[2] or query.shape[2] >= FEW
    return many and _plan(query, key, segments) is not None


def _row(x: Tensor, index: Tensor | None) -> Tensor:
    """[b, heads, s, d] -> [tokens, heads, d]"""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat.contiguous() if index is None else flat.index_select(0, index)


def _placed(row: Tensor, index: Tensor | None, like: Tensor, empty: float = 0.0) -> Tensor:
    """A row [tokens, heads, ...] back at the places of ``like`` [b, heads, s, d]; ``empty`` where there is none."""
    if index is not None:
        whole = row.new_full((like.shape[0] * like.shape[2], *row.shape[1:]), empty)
        row = whole.index_copy(0, index, row)
    return row.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _rows(query: Tensor, key: Tensor, value: Tensor, plan: _Plan, gqa: bool) -> list[Tensor]:
    rows = [_row(query, plan.queries), _row(key, plan.keys), _row(value, plan.keys)]
    repeats = query.shape[1] // key.shape[1]
    return rows if gqa or repeats == 1 else [rows[0], *(x.repeat_interleave(repeats, dim=1) for x in rows[1:])]


def _call(rows: list[Tensor], plan: _Plan, **options: Any) -> Any:
    assert VARLEN is not None
    if plan.causal:
        options |= {"window_size": (-1, 0)} if "window_size" in _words(VARLEN) else {"is_causal": True}
    if rows[0].shape[1] != rows[1].shape[1]:
        options["enable_gqa"] = True
    return VARLEN(*rows, plan.query_bounds, plan.key_bounds, *plan.longest, **options)


def _words(kernel: Any) -> set[str]:
    schema = getattr(getattr(kernel, "default", None), "_schema", None)
    return {argument.name for argument in schema.arguments} if schema else set(inspect.signature(kernel).parameters)


def _takes_groups() -> bool:
    return "enable_gqa" in _words(VARLEN)


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """As :func:`megaforge.kernels.attention.native.attention`, where :func:`takes` says so."""
    plan = _plan(query, key, segments)
    assert plan is not None
    return _placed(_call(_rows(query, key, value, plan, _takes_groups()), plan), plan.queries, query)


@torch.no_grad()
def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`megaforge.kernels.attention.native.attention_with_lse`."""
    plan = _plan(query, key, segments)
    assert plan is not None
    out, lse = _call(_rows(query, key, value, plan, _takes_groups()), plan, return_aux=AuxRequest(lse=True))
    # [heads, tokens] as the kernel has it
    return _placed(out.float(), plan.queries, query), _placed(lse.t(), plan.queries, query, float("-inf"))


@torch.no_grad()
def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`megaforge.kernels.attention.native.attention_gradients`."""
    plan = _plan(query, key, segments)
    assert plan is not None
    rows = _rows(query, key, value, plan, _takes_groups())
    whole = [_row(x.to(query.dtype), plan.queries) for x in (grad, out)]
    log_sums = _row(lse.unsqueeze(-1), plan.queries).squeeze(-1).t().contiguous()
    assert BACKWARD is not None
    options = {"window_size": [-1, 0 if plan.causal else -1]} if "window_size" in _words(BACKWARD) else {}
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    dq, dk, dv = BACKWARD(
        whole[0], *rows, whole[1], log_sums, plan.query_bounds, plan.key_bounds, *plan.longest, plan.causal, state,
        **options,
    )  # fmt: skip
    dk, dv = (_placed(x.float().unflatten(1, (key.shape[1], -1)).sum(2), plan.keys, key) for x in (dk, dv))
    return _placed(dq.float(), plan.queries, query), dk, dv
