"""Attention on a projection's queries, keys and values as they lie beside each other, which it turns by their angles
(RoPE) as it reads them; their gradients are written side by side, too. So nothing is copied, and no turned queries or
keys are kept. Compiled for CPUs: ``megaforge::attention_fused`` of ``csrc/attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.kernels.attention import native
from megaforge.kernels.native import define


class Turns(NamedTuple):
    """Angles by which queries and keys turn: channel i with channel i + r/2, as in
    :func:`megaforge.kernels.pointwise.apply_rotary`.

    Attributes:
        cos, sin: fp32 [s, b, r/2], contiguous.
    """

    cos: Tensor
    sin: Tensor


def takes_fused(fused: Tensor) -> bool:
    """Whether there is compiled code for :func:`fused_attention` on these: fp32 or bf16, on a CPU."""
    return native.takes(fused) and _COMPILED


def fused_attention(fused: Tensor, value: Tensor | None, turns: Turns | None, segments: Tensor, heads: int) -> Tensor:
    """Attention within segments, where the queries' places are the keys'.

    Args:
        fused: [s, b, heads + 2 groups, d], queries, keys and values; [s, b, heads + groups, d] with a ``value``.
        value: [s, b, groups, d], where values lie elsewhere.
        turns: of queries and keys; None: they do not turn.
        segments: int64 [n, 6], see :mod:`.segments`.
        heads: of the queries.

    Returns:
        [s, b, heads, d] of the dtype of ``fused``; zeros where a query sees nothing.
    """
    cos, sin = (None, None) if turns is None else turns
    scale = fused.shape[-1] ** -0.5
    out: Tensor = torch.ops.megaforge.attention_fused(fused, value, cos, sin, segments, heads, scale)[0]
    return out


def _shapes(fused: Tensor, value: Tensor | None, cos: Any, sin: Any, segments: Any, heads: int, scale: float) -> Any:
    s, b, _, d = fused.shape
    return fused.new_empty((s, b, heads, d)), fused.new_empty((b, heads, s), dtype=torch.float32)


def _shapes_backward(grad: Tensor, fused: Tensor, value: Tensor | None, *rest: Any) -> Any:
    shape = (0,) if value is None else value.shape
    return fused.new_empty(fused.shape), fused.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    fused, value, cos, sin, segments, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(fused, value, cos, sin, *output, segments)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    dfused, dvalue = torch.ops.megaforge.attention_fused_backward(grad, *saved, ctx.heads, ctx.scale)
    return dfused, None if saved[1] is None else dvalue, None, None, None, None, None


# The output, and its log-sum-exp [b, heads, s] in fp32.
define(
    "attention_fused(Tensor fused, Tensor? value, Tensor? cos, Tensor? sin, Tensor segments, int heads, float scale)"
    " -> (Tensor out, Tensor lse)",
    _shapes, gradient=_differentiate, context=_save,
)  # fmt: skip
define(
    "attention_fused_backward(Tensor grad, Tensor fused, Tensor? value, Tensor? cos, Tensor? sin, Tensor out,"
    " Tensor lse, Tensor segments, int heads, float scale) -> (Tensor dfused, Tensor dvalue)",
    _shapes_backward,
)  # fmt: skip

# Code that was compiled before has the other operators alone.
_COMPILED = torch._C._dispatch_has_kernel_for_dispatch_key("megaforge::attention_fused", "CPU")
