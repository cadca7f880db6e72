"""Attention as compiled operators of torch, ``megaforge::attention`` and ``megaforge::attention_backward``: flash
attention (Dao, arXiv 2307.08691) for CPUs. The code is in ``csrc/attention``; here are schemas, shapes and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.kernels.native import define, load

DTYPES = (torch.float32, torch.bfloat16)


def takes(query: Tensor) -> bool:
    """Whether there is compiled code for the device of ``query``, and it takes its dtype."""
    return query.device.type == "cpu" and "cpu" in COMPILED and query.dtype in DTYPES


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
    """Attention within segments.

    Args:
        query: [b, heads, s, d], fp32 or bf16.
        key, value: [b, groups, t, d]; each group serves heads / groups neighbouring heads.
        segments: int64 [n, 6], see :mod:`.segments`.

    Returns:
        [b, heads, s, d] of the dtype of ``query``, laid out as [s, b, heads, d]; zeros where a query sees nothing.
    """
    out: Tensor = torch.ops.megaforge.attention(query, key, value, segments, query.shape[-1] ** -0.5, False)[0]
    return out


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`attention` in fp32, and the log of each query's sum of exponentials [b, heads, s] in fp32, with which
    parts are put together: -inf where a query sees nothing. Not differentiable."""
    with torch.no_grad():
        result: tuple[Tensor, Tensor] = torch.ops.megaforge.attention(
            query, key, value, segments, query.shape[-1] ** -0.5, True
        )
    return result


def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in fp32 of queries, keys and values through these segments.

    Args:
        grad, out: [b, heads, s, d], the gradient and the whole of the output, of which the segments may be a part.
        lse: of the whole output.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.megaforge.attention_backward(
        grad, query, key, value, out, lse, segments, query.shape[-1] ** -0.5, True
    )
    return result


def _laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, in the shape of ``x``, as the operators lay out results."""
    b, heads, s, d = x.shape
    return x.new_empty((s, b, heads, d), dtype=dtype).permute(1, 2, 0, 3)


def _shapes(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, wide: bool) -> Any:
    dtype = torch.float32 if wide else query.dtype
    return _laid_out(query, dtype), query.new_empty(query.shape[:3], dtype=torch.float32)


def _shapes_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    dtype = torch.float32 if rest[-1] else query.dtype
    return _laid_out(query, dtype), _laid_out(key, dtype), _laid_out(value, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, ctx.scale, _ = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, segments)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    grads = torch.ops.megaforge.attention_backward(grad, *ctx.saved_tensors, ctx.scale, False)
    return *grads, None, None, None


# The output in the dtype of the queries, or in fp32 where it is wide, and its log-sum-exp [b, heads, s] in fp32.
define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor segments, float scale, bool wide)"
    " -> (Tensor out, Tensor lse)",
    _shapes, gradient=_differentiate, context=_save,
)  # fmt: skip
define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor segments,"
    " float scale, bool wide) -> (Tensor dquery, Tensor dkey, Tensor dvalue)",
    _shapes_backward,
)  # fmt: skip

COMPILED = load("attention")
