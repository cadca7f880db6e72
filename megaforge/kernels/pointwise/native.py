"""Pointwise operators compiled for CPUs, in fp32 and bf16 with fp32 arithmetic. The code is in ``csrc/pointwise``; here
are schemas, shapes and the autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.native import define, load, say_uncompiled

DTYPES = (torch.float32, torch.bfloat16)
SILU, SQUARED_RELU = 0, 1  # gates


def takes(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether there is compiled code for tensors like ``x`` with these vectors of its width, in fp32. On a CPU it says
    once where it is missing."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] == 0:
        return False
    if "cpu" not in COMPILED:
        say_uncompiled("pointwise", "cpu")
        return False
    return all(
        v is None or (v.dtype == torch.float32 and v.shape == x.shape[-1:] and v.device == x.device) for v in vectors
    )


class Norm(torch.autograd.Function):
    """A norm's output; keeps x and a number or two for each row, and forms all gradients in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool) -> Tensor:
        out, _, mean, scale = _NORM(x, None, weight, bias, epsilon, centered)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.centered, ctx.biased = centered, bias is not None
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dx, dweight, dbias = _NORM_BACKWARD(grad, None, x, weight, mean, scale, ctx.centered)
        return dx, dweight, dbias if ctx.biased else None, None, None


class StreamNorm(torch.autograd.Function):
    """The norm of ``x + update``, or of ``x`` alone, and that sum; keeps it and a number or two for each row. Its
    backward pass adds to the norm's gradient the one that the sum has by other ways."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool
    ) -> tuple[Tensor, Tensor]:
        out, total, mean, scale = _NORM(x, update, weight, bias, epsilon, centered)
        stream = x if update is None else total
        ctx.save_for_backward(stream, weight, mean, scale)
        ctx.centered, ctx.biased, ctx.adds = centered, bias is not None, update is not None
        ctx.set_materialize_grads(False)
        return out, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_stream: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody used the norm
            return grad_stream, grad_stream if ctx.adds else None, None, None, None, None
        stream, weight, mean, scale = ctx.saved_tensors
        dx, dweight, dbias = _NORM_BACKWARD(grad, grad_stream, stream, weight, mean, scale, ctx.centered)
        return dx, dx if ctx.adds else None, dweight, dbias if ctx.biased else None, None, None


class SquaredReLU(torch.autograd.Function):
    """``max(x, 0)^2``; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = _SQUARED_RELU(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dx: Tensor = _SQUARED_RELU_BACKWARD(grad, *ctx.saved_tensors)
        return dx


class Gated(torch.autograd.Function):
    """``gate(x[..., :f]) * x[..., f:]``; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gate = gate
        out: Tensor = _GATED(x, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _GATED_BACKWARD(grad, *ctx.saved_tensors, ctx.gate), None


class Weighted(torch.autograd.Function):
    """``activated(x) * weight`` of rows [R, f], or gated [R, 2f], with a weight each; keeps both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate: int, gated: bool) -> Tensor:
        wide = weights.float()
        ctx.save_for_backward(x, wide)
        ctx.options, ctx.dtype = (gate, gated), weights.dtype
        out: Tensor = _WEIGHTED(x, wide, gate, gated)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights = _WEIGHTED_BACKWARD(grad, *ctx.saved_tensors, *ctx.options)
        return dx, dweights.to(ctx.dtype), None, None


def _norm_shapes(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool
) -> tuple[Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    numbers = weight.new_empty(rows if centered else 0), weight.new_empty(rows)
    out = x.new_empty(x.shape)
    return out, x.new_empty(0 if update is None else x.shape), *numbers


def _norm_backward_shapes(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, centered: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight) if centered else 0)


# The norm of x, or of x + update, which is the second result; each row's mean where it is centered, and its scale.
define(
    "norm(Tensor x, Tensor? update, Tensor weight, Tensor? bias, float epsilon, bool centered)"
    " -> (Tensor out, Tensor sum, Tensor mean, Tensor scale)",
    _norm_shapes,
)  # fmt: skip
# grad_sum: the gradient that what was normed has by other ways, which is added.
define(
    "norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor scale, bool centered)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_backward_shapes,
)  # fmt: skip
define("squared_relu(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
define("squared_relu_backward(Tensor grad, Tensor x) -> Tensor", lambda grad, x: x.new_empty(x.shape))
define("gated(Tensor x, int gate) -> Tensor", lambda x, gate: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
define("gated_backward(Tensor grad, Tensor x, int gate) -> Tensor", lambda grad, x, gate: x.new_empty(x.shape))
define(
    "weighted(Tensor x, Tensor weights, int gate, bool gated) -> Tensor",
    lambda x, weights, gate, gated: x.new_empty(len(x), x.shape[1] // (2 if gated else 1)),
)
define(
    "weighted_backward(Tensor grad, Tensor x, Tensor weights, int gate, bool gated) -> (Tensor dx, Tensor dweights)",
    lambda grad, x, weights, gate, gated: (x.new_empty(x.shape), weights.new_empty(weights.shape)),
)

COMPILED = load("pointwise")
# A packet (torch.ops.megaforge.norm) looks for the overload at each call.
_NORM, _NORM_BACKWARD = torch.ops.megaforge.norm.default, torch.ops.megaforge.norm_backward.default
_SQUARED_RELU = torch.ops.megaforge.squared_relu.default
_SQUARED_RELU_BACKWARD = torch.ops.megaforge.squared_relu_backward.default
_GATED, _GATED_BACKWARD = torch.ops.megaforge.gated.default, torch.ops.megaforge.gated_backward.default
_WEIGHTED, _WEIGHTED_BACKWARD = torch.ops.megaforge.weighted.default, torch.ops.megaforge.weighted_backward.default
