"""RWKV-7's arithmetic around its projections as autograd functions of Triton kernels (:mod:`.triton_kernels`)."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.native import SWITCH


@functools.cache
def load_triton() -> tuple[Any, str]:
    """The module of kernels; or None and why, where Triton is not installed or compiled code is not wanted."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    try:
        return importlib.import_module("megaforge.kernels.rwkv7_fused.triton_kernels"), ""
    except ImportError as error:
        return None, f"{error}; to install it: pip install 'megaforge[gpu]'"


class ShiftedMixes(torch.autograd.Function):
    """Forward: :func:`shifted_mixes_reference`. Backward: its gradients from x alone; each a kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor | None, starts: Tensor | None, *coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        kernels, _ = load_triton()
        x = x.contiguous()
        before = x if first is None else first.to(x.dtype).contiguous()
        marks = x if starts is None else starts.to(torch.uint8).contiguous()
        stacked = torch.stack([c.to(x.dtype) for c in coefficients])
        ctx.options = {"count": len(coefficients), "has_first": first is not None, "has_starts": starts is not None}
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
        kernels, _ = load_triton()
        x, before, marks, stacked = ctx.saved_tensors
        s, batch, width = x.shape
        first_dtype, *dtypes = ctx.dtypes
        programs = _blocks(s * batch, kernels.ROWS * kernels.STEPS)
        dx, dfirst = torch.empty_like(x), x.new_zeros(batch, width, dtype=torch.promote_types(x.dtype, torch.float32))
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
        kernels, _ = load_triton()
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
        kernels, _ = load_triton()
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
