"""Compiled attention some of whose probabilities are dropped: ``megaforge::attention_dropped`` of ``csrc/attention``.
The masks are those of :mod:`megaforge.parallel.dropout`, made as they are needed, in both passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.kernels.attention import native
from megaforge.kernels.native import define


def takes(query: Tensor) -> bool:
    """Whether there is compiled code for :func:`dropped_attention` on these: fp32 or bf16, on a CPU."""
    return native.takes(query) and _COMPILED


def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, rows: Tensor, threshold: int
) -> Tensor:
    """``(dropout(softmax(q k^T / sqrt(d)))) v`` within segments.

    Args:
        query: [b, heads, s, d].
        key, value: [b, groups, t, d], of the places 0 to t; each group serves heads / groups neighbouring heads.
        segments: int64 [n, 6], see :mod:`.segments`.
        rows: int64 [b, heads, s], keys of the generator.
        threshold: how many of 65,536 are dropped; what stays is divided by the share that does.

    Returns:
        [b, heads, s, d] of the dtype of ``query``; zeros where a query sees nothing.
    """
    scale = query.shape[-1] ** -0.5
    out: Tensor = torch.ops.megaforge.attention_dropped(query, key, value, segments, rows, threshold, scale)[0]
    return out


def _shapes(query: Tensor, *rest: Any) -> Any:
    return native._laid_out(query, query.dtype), query.new_empty(query.shape[:3], dtype=torch.float32)


def _shapes_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(native._laid_out(x, query.dtype) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, rows, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, segments, rows)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    grads = torch.ops.megaforge.attention_dropped_backward(grad, *saved, ctx.threshold, ctx.scale)
    return *grads, None, None, None, None


# The output, and its log-sum-exp [b, heads, s] in fp32.
define(
    "attention_dropped(Tensor query, Tensor key, Tensor value, Tensor segments, Tensor rows, int threshold,"
    " float scale) -> (Tensor out, Tensor lse)",
    _shapes, gradient=_differentiate, context=_save,
)  # fmt: skip
define(
    "attention_dropped_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor segments, Tensor rows, int threshold, float scale) -> (Tensor dquery, Tensor dkey, Tensor dvalue)",
    _shapes_backward,
)  # fmt: skip

# Code that was compiled before has the other operators alone.
_COMPILED = torch._C._dispatch_has_kernel_for_dispatch_key("megaforge::attention_dropped", "CPU")
