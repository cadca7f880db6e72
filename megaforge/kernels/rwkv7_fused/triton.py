"""RWKV-7's arithmetic around its projections as autograd functions of Triton kernels (:mod:`.triton_kernels`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.native import triton_kernels
from megaforge.kernels.rwkv7_fused.reference import DECAY_SCALE, NORM_EPSILON

_kernels = functools.partial(triton_kernels, "rwkv7_fused")


class ShiftedMixes(torch.autograd.Function):
    """Forward: :func:`shifted_mixes_reference`. Backward: its gradients from x alone; each a kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor | None, starts: Tensor | None, *coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        kernels, _ = _kernels()
        x = x.contiguous()
        before = x if first is None else first.to(x.dtype).contiguous()
        marks = x if starts is None else starts.to(torch.uint8).contiguous()
        stacked = torch.stack([c.to(x.dtype) for c in coefficients])
        chunks = 1 if first is None else len(first)
        ctx.options = {"count": len(coefficients), "has_first": first is not None, "has_starts": starts is not None}
        ctx.options["chunks"] = chunks
        ctx.options["wide"] = kernels.tl.float32
        ctx.save_for_backward(x, before, marks, stacked)
        ctx.dtypes = [None if first is None else first.dtype, *(c.dtype for c in coefficients)]
        s, batch, width = x.shape
        out = [torch.empty_like(x) for _ in coefficients]
        if x.numel():
            grid = (_blocks(s * batch, kernels.ROWS), _blocks(width, kernels.WIDTH))
            kernels.mix_forward[grid](
                x, before, marks, stacked, *_filled(out), s * batch, batch, width, **ctx.options,
                block_rows=kernels.ROWS, block_width=kernels.WIDTH,
            )  # fmt: skip
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, _ = _kernels()
        x, before, marks, stacked = ctx.saved_tensors
        s, batch, width = x.shape
        first_dtype, *dtypes = ctx.dtypes
        programs = _blocks(s * batch, kernels.ROWS * kernels.STEPS)
        wide = torch.promote_types(x.dtype, torch.float32)
        dx, dfirst = torch.empty_like(x), x.new_zeros(ctx.options["chunks"], batch, width, dtype=wide)
        dc = dfirst.new_zeros(programs, len(dtypes), width)
        if x.numel():
            kernels.mix_backward[(programs, _blocks(width, kernels.WIDTH))](
                x, before, marks, stacked, *_filled([g.contiguous() for g in grads]), dx, dfirst, dc,
                s * batch, batch, width, **ctx.options,
                block_rows=kernels.ROWS, steps=kernels.STEPS, block_width=kernels.WIDTH,
            )  # fmt: skip
        totals = dc.sum(0)
        of_first = None if first_dtype is None else dfirst.to(first_dtype)
        return dx, of_first, None, *(total.to(dtype) for total, dtype in zip(totals, dtypes, strict=True))


class FusedInputs(torch.autograd.Function):
    """Forward: :func:`rwkv7_inputs_reference`. Backward: its gradients from the inputs alone; each a kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        decay: Tensor,
        w0: Tensor,
        rate: Tensor,
        a0: Tensor,
        key: Tensor,
        k_k: Tensor,
        k_a: Tensor,
        head_size: int,
    ) -> tuple[Tensor, ...]:
        kernels, _ = _kernels()
        tensors = [x.contiguous() for x in (decay, w0, rate, a0, key, k_k, k_a)]
        ctx.save_for_backward(*tensors)
        heads, tokens = key.shape[-1] // head_size, key[..., 0].numel()
        ctx.shape = (tokens, heads, DECAY_SCALE, NORM_EPSILON)
        ctx.options = {"n": head_size, "wide": kernels.tl.float32, "block_rows": kernels.ROWS}
        out = [torch.empty_like(tensors[4]) for _ in range(3)]
        log_w = torch.empty_like(tensors[4], dtype=w0.dtype)
        if key.numel():
            kernels.inputs_forward[(_blocks(tokens, kernels.ROWS), heads)](
                *tensors, log_w, *out, *ctx.shape, **ctx.options
            )
        return log_w, *out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, _ = _kernels()
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        tokens, heads, *_ = ctx.shape
        programs = _blocks(tokens, kernels.ROWS * kernels.STEPS)
        out = [torch.empty_like(x) for x in tensors[:5:2]]
        vector = tensors[1]
        partial = vector.new_zeros(programs, 4, len(vector), dtype=torch.float32)
        if out[0].numel():
            kernels.inputs_backward[(programs, heads)](
                *tensors, *(g.contiguous() for g in grads), *out, partial, *ctx.shape,
                **ctx.options, steps=kernels.STEPS,
            )  # fmt: skip
        sums = partial.sum(0).to(vector.dtype)
        return out[0], sums[0], out[1], sums[1], out[2], sums[2], sums[3], None


class MixValues(torch.autograd.Function):
    """Forward: :func:`mix_values_reference`. Backward: its gradients from the inputs alone; each a kernel."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, v_first: Tensor, rate: Tensor, v0: Tensor) -> Tensor:
        kernels, _ = _kernels()
        tensors = [x.contiguous() for x in (v, v_first, rate, v0)]
        ctx.save_for_backward(*tensors)
        width = v.shape[-1]
        rows = v.numel() // max(width, 1)
        out = torch.empty_like(tensors[0])
        if v.numel():
            kernels.values_forward[(_blocks(rows, kernels.ROWS), _blocks(width, kernels.WIDTH))](
                *tensors, out, rows, width,
                wide=kernels.tl.float32, block_rows=kernels.ROWS, block_width=kernels.WIDTH,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        kernels, _ = _kernels()
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        v, v0 = tensors[0], tensors[3]
        rows = v.numel() // max(len(v0), 1)
        programs = _blocks(rows, kernels.ROWS * kernels.STEPS)
        grads = [torch.empty_like(x) for x in tensors[:3]]
        partial = v0.new_zeros(programs, len(v0), dtype=torch.float32)
        if v.numel():
            kernels.values_backward[(programs, _blocks(len(v0), kernels.WIDTH))](
                *tensors, grad.contiguous(), *grads, partial, rows, len(v0),
                wide=kernels.tl.float32, block_rows=kernels.ROWS, steps=kernels.STEPS, block_width=kernels.WIDTH,
            )  # fmt: skip
        return *grads, partial.sum(0).to(v0.dtype)


class NormBonusGate(torch.autograd.Function):
    """Forward: :func:`norm_bonus_gate_reference`. Backward: its gradients from the inputs alone; each a kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        r_k: Tensor,
        epsilon: float,
    ) -> Tensor:
        kernels, _ = _kernels()
        tensors = [x.contiguous() for x in (y, r, k, v, gate, weight, bias, r_k)]
        ctx.save_for_backward(*tensors)
        ctx.epsilon = epsilon
        s, batch, heads, n = y.shape
        out = torch.empty(s, batch, heads * n, dtype=v.dtype, device=v.device)
        if y.numel():
            kernels.finish_forward[(_blocks(s * batch, kernels.ROWS), heads)](
                *tensors, out, s * batch, heads, epsilon, n=n, wide=kernels.tl.float32, block_rows=kernels.ROWS
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        kernels, _ = _kernels()
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        y, weight, bias, r_k = tensors[0], tensors[5], tensors[6], tensors[7]
        s, batch, heads, n = y.shape
        programs = _blocks(s * batch, kernels.ROWS * kernels.STEPS)
        grads = [torch.empty_like(x) for x in tensors[:5]]
        wide = torch.promote_types(y.dtype, torch.float32)
        partial = torch.zeros(programs, 3, heads * n, dtype=wide, device=y.device)
        if y.numel():
            kernels.finish_backward[(programs, heads)](
                *tensors, dout.contiguous(), *grads, partial, s * batch, heads, ctx.epsilon, n=n,
                wide=kernels.tl.float32, block_rows=kernels.ROWS, steps=kernels.STEPS,
            )  # fmt: skip
        dweight, dbias, dr_k = partial.sum(0)
        return *grads, dweight.to(weight.dtype), dbias.to(bias.dtype), dr_k.view_as(r_k).to(r_k.dtype), None


def _blocks(size: int, block: int) -> int:
    return max(1, -(-size // block))


def _filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernels have places for; those past the end are not touched."""
    return [*tensors, *([tensors[0]] * (6 - len(tensors)))]
