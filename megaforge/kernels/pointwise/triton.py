"""Pointwise operators as autograd functions of Triton kernels (:mod:`.triton_kernels`): one pass each way."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.native import say_no_triton, takes_triton, triton_kernels

WIDEST = 16384  # channels of a row that one program holds
WHAT = "norms and activations"

_kernels = functools.partial(triton_kernels, "pointwise")


def takes(x: Tensor) -> bool:
    """Whether tensors like ``x`` go through the Triton kernels."""
    return takes_triton("pointwise", WHAT, x)


def takes_rows(x: Tensor) -> bool:
    """:func:`takes`, and a program can hold a row."""
    if not takes(x):
        return False
    if x.shape[-1] > WIDEST:
        say_no_triton(WHAT, f"{x.shape[-1]} channels are normed, of which a program holds {WIDEST} at most")
    return x.shape[-1] <= WIDEST


def _blocks(size: int, block: int) -> int:
    return max(1, -(-size // block))


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _groups_of_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` [..., group, width], as it is where its rows lie in groups a stride apart, as heads in a wider projection
    do; elsewhere contiguous. And the group and the stride."""
    if x.is_contiguous() or x.dim() < 3:
        return x.contiguous(), 1, x.shape[-1]
    *outer, group, width = zip(x.shape, x.stride(), strict=True)
    stride = outer[-1][1]
    if width[1] != 1 or group[1] != width[0]:
        return x.contiguous(), 1, x.shape[-1]
    expected = stride
    for size, step in reversed(outer):
        if size != 1 and step != expected:
            return x.contiguous(), 1, x.shape[-1]
        expected *= size
    return x, group[0], stride


class Norm(torch.autograd.Function):
    """``normed(x) * weight + bias``, with mean zero if centered; keeps x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool) -> Tensor:
        return _norm(ctx, x, None, weight, bias, epsilon, centered)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_gradients(ctx, grad, None), None, None


class StreamNorm(torch.autograd.Function):
    """:class:`Norm` of ``x + update``, or of ``x`` alone, and that sum, which it keeps. Its backward pass adds to the
    norm's gradient the one that the sum has by other ways."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.adds = update is not None
        ctx.set_materialize_grads(False)
        return _norm(ctx, x, update, weight, bias, epsilon, centered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_stream: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody used the norm
            return grad_stream, grad_stream if ctx.adds else None, None, None, None, None
        dx, dweight, dbias = _norm_gradients(ctx, grad, grad_stream)
        return dx, dx if ctx.adds else None, dweight, dbias, None, None


def _norm(
    ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + update``, and that sum."""
    kernels, _ = _kernels()
    given = x
    if update is None:
        x, group, stride = _groups_of_rows(x)
    else:
        x, group, stride = x.contiguous(), 1, x.shape[-1]
    weight, width = weight.contiguous(), x.shape[-1]
    block_width = _power_of_two(width)
    block_rows = max(1, kernels.TILE // block_width)
    ctx.options = {"centered": centered, "wide": kernels.tl.float32, "block_width": block_width}
    ctx.options |= {"block_rows": block_rows, "num_warps": max(1, min(16, block_rows * block_width // 512))}
    ctx.shape = (x.numel() // max(width, 1), width, epsilon, group, stride)
    ctx.bias_dtype = None if bias is None else bias.dtype
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if update is None else torch.empty_like(x)
    ctx.save_for_backward(total, weight)
    if x.numel():
        kernels.norm_forward[(_blocks(ctx.shape[0], block_rows),)](
            x, x if update is None else update.contiguous(), weight, weight if bias is None else bias.contiguous(), out,
            total, *ctx.shape, adds=update is not None, **ctx.options,
        )  # fmt: skip
    return out, given if update is None else total


def _norm_gradients(ctx: Any, grad: Tensor, grad_stream: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the stream, of weight and of bias; ``grad_stream`` is added to the first."""
    kernels, _ = _kernels()
    x, weight = ctx.saved_tensors
    rows, width, *_ = ctx.shape
    programs = _blocks(rows, ctx.options["block_rows"] * kernels.STEPS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = weight.new_zeros(programs, 2 if ctx.options["centered"] else 1, width, dtype=torch.float32)
    if x.numel():
        grad = grad.contiguous()
        kernels.norm_backward[(programs,)](
            x, weight, grad, grad if grad_stream is None else grad_stream.contiguous(), dx, partial, *ctx.shape,
            adds=grad_stream is not None, **ctx.options, steps=kernels.STEPS,
        )  # fmt: skip
    sums = partial.sum(0)
    return dx, sums[0].to(weight.dtype), None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)


class SquaredReLU(torch.autograd.Function):
    """``max(x, 0)^2``; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kernels, _ = _kernels()
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        if x.numel():
            kernels.squared_relu_forward[(_blocks(x.numel(), kernels.ELEMENTS),)](
                x, out, x.numel(), wide=kernels.tl.float32, block=kernels.ELEMENTS
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kernels, _ = _kernels()
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        if x.numel():
            kernels.squared_relu_backward[(_blocks(x.numel(), kernels.ELEMENTS),)](
                x, grad.contiguous(), dx, x.numel(), wide=kernels.tl.float32, block=kernels.ELEMENTS
            )
        return dx


class Gated(torch.autograd.Function):
    """``silu(gate) * up`` of the fused [gate | up], or ``max(gate, 0)^2 * up``; keeps it, and puts both gradients into
    one tensor."""

    @staticmethod
    def forward(ctx: Any, fused: Tensor, squared: bool) -> Tensor:
        kernels, _ = _kernels()
        fused = fused.contiguous()
        ctx.save_for_backward(fused)
        width = fused.shape[-1] // 2
        ctx.shape = (fused.numel() // max(2 * width, 1), width)
        ctx.grid = (_blocks(ctx.shape[0], kernels.ROWS), _blocks(width, kernels.WIDTH))
        ctx.options = {"squared": squared, "wide": kernels.tl.float32}
        ctx.options |= {"block_rows": kernels.ROWS, "block_width": kernels.WIDTH}
        out = fused.new_empty(*fused.shape[:-1], width)
        if fused.numel():
            kernels.gated_forward[ctx.grid](fused, out, *ctx.shape, **ctx.options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kernels, _ = _kernels()
        (fused,) = ctx.saved_tensors
        dx = torch.empty_like(fused)
        if fused.numel():
            kernels.gated_backward[ctx.grid](fused, grad.contiguous(), dx, *ctx.shape, **ctx.options)
        return dx, None


class Weighted(torch.autograd.Function):
    """``activated(x) * weight`` of rows [R, f] (gated: [R, 2f], gate before up) with a weight each: max(x, 0)^2 if
    squared, or silu; keeps both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, squared: bool, gated: bool) -> Tensor:
        kernels, _ = _kernels()
        x, weights = x.contiguous(), weights.contiguous()
        ctx.save_for_backward(x, weights)
        rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
        ctx.shape, ctx.tiles = (rows, width), _blocks(width, kernels.WIDTH)
        ctx.options = {"squared": squared, "gated": gated, "wide": kernels.tl.float32}
        ctx.options |= {"block_rows": kernels.ROWS, "block_width": kernels.WIDTH}
        out = x.new_empty(rows, width)
        if x.numel():
            kernels.weighted_forward[(_blocks(rows, kernels.ROWS), ctx.tiles)](
                x, weights, out, rows, width, **ctx.options
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels, _ = _kernels()
        x, weights = ctx.saved_tensors
        dx, dweights = torch.empty_like(x), torch.zeros_like(weights)
        if x.numel():
            kernels.weighted_backward[(_blocks(ctx.shape[0], kernels.ROWS),)](
                x, weights, grad.contiguous(), dx, dweights, *ctx.shape, tiles=ctx.tiles, **ctx.options
            )
        return dx, dweights, None, None


class Rotate(torch.autograd.Function):
    """Rotates channel pairs (i, i + r/2) of the first r channels. Backward: rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    kernels, _ = _kernels()
    _, batch, heads, width = x.shape
    half = cos.shape[-1]
    if x.stride(3) != 1 or x.stride(2) != width:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_half, block_rest = _power_of_two(half), _power_of_two(max(width - 2 * half, 1))
    block_rows = max(1, kernels.ELEMENTS // max(block_half, block_rest))
    rows = x.numel() // max(width, 1)
    if x.numel():
        kernels.rotate[(_blocks(rows, block_rows),)](
            x, cos, sin, out, rows, batch, heads, x.stride(0), x.stride(1),
            half=half, width=width, back=back, wide=kernels.tl.float32,
            block_rows=block_rows, block_half=block_half, block_rest=block_rest,
        )  # fmt: skip
    return out
