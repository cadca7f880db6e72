"""RWKV-7's arithmetic around its projections in one pass over the tokens each way, where Triton runs: on GPUs.

:func:`shifted_mixes` is the token shift with the mixes that the projections read, :func:`norm_bonus_gate` what follows
WKV-7. Each has its definition in plain torch beside it (``*_reference``), which other devices use.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megaforge.config.launcher import print_rank_0
from megaforge.kernels.native import SWITCH

HEAD_SIZES = (16, 32, 64, 128)


@functools.cache
def _kernels() -> Any:
    """The Triton kernels, or None, which is said, where Triton is not installed or compiled code is not wanted."""
    if os.environ.get(SWITCH) == "0":
        say_plain(f"{SWITCH}=0")
        return None
    try:
        return importlib.import_module("megaforge.kernels.rwkv7_triton")
    except ImportError as error:
        say_plain(f"{error}; to install it: pip install 'megaforge[gpu]'")
        return None


@functools.cache
def say_plain(reason: str) -> None:
    """Says, once a process and on rank 0 alone, that a GPU computes in plain torch, and why."""
    print_rank_0(f"rwkv7 around its recurrence: no Triton kernel ({reason}); using plain torch, several times slower")


def fused(x: Tensor) -> bool:
    """Whether tensors like ``x`` go through the Triton kernels."""
    if x.device.type != "cuda":
        return False
    if x.dtype == torch.float64:
        say_plain("they compute in fp32 at most, not in fp64")
        return False
    return _kernels() is not None


def shifted_mixes_reference(
    x: Tensor, first: Tensor | None, starts: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The definition of :func:`shifted_mixes`."""
    before = torch.zeros_like(x[:1]) if first is None else first.to(x.dtype).unsqueeze(0)
    previous = torch.cat([before, x[:-1]])
    if starts is not None:
        previous = previous.masked_fill(starts.unsqueeze(-1), 0)
    return tuple(torch.lerp(x, previous, c.to(x.dtype)) for c in coefficients)


def shifted_mixes(
    x: Tensor, first: Tensor | None, starts: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """``x + (previous - x) * c`` for each c, with ``previous`` the token before in the same document.

    Args:
        x: [s, b, h].
        first: [b, h], the token before ``x[0]``; None: zero.
        starts: bool [s, b], true where nothing comes before; None: nowhere.
        coefficients: at most six, each [h]; may be wider than ``x``.

    Returns:
        One [s, b, h] of the dtype of ``x`` for each coefficient.
    """
    if fused(x):
        return _ShiftedMixes.apply(x, first, starts, *coefficients)
    return shifted_mixes_reference(x, first, starts, coefficients)


def norm_bonus_gate_reference(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, epsilon: float
) -> Tensor:
    """The definition of :func:`norm_bonus_gate`."""
    normed = F.layer_norm(y.to(r_k.dtype), (y.shape[-1],), eps=epsilon).flatten(2)
    normed = torch.addcmul(bias, normed, weight)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (normed + bonus.flatten(2)).to(v.dtype) * gate


def norm_bonus_gate(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, epsilon: float
) -> Tensor:
    """``(norm(y) * weight + bias + (sum_head r k r_k) v) * gate``: RWKV-7's output before its last projection.

    Args:
        y, r, k, v: [s, b, H, N]; the norm is over each head.
        gate: [s, b, H N].
        weight, bias: [H N], fp32 (fp64 for fp64 inputs).
        r_k: [H, N], likewise.
        epsilon: of the norm.

    Returns:
        [s, b, H N] of the dtype of ``v``.
    """
    if fused(y):
        if y.shape[-1] not in HEAD_SIZES:
            say_plain(f"heads have {y.shape[-1]} channels, not one of {', '.join(map(str, HEAD_SIZES))}")
            return norm_bonus_gate_reference(y, r, k, v, gate, weight, bias, r_k, epsilon)
        return _NormBonusGate.apply(y, r, k, v, gate, weight, bias, r_k, epsilon)
    return norm_bonus_gate_reference(y, r, k, v, gate, weight, bias, r_k, epsilon)


def _wide(x: Tensor, kernels: Any) -> Any:
    return kernels.tl.float64 if x.dtype == torch.float64 else kernels.tl.float32


class _ShiftedMixes(torch.autograd.Function):
    """Forward: :func:`shifted_mixes_reference`. Backward: its gradients from x alone; each a kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor | None, starts: Tensor | None, *coefficients: Tensor
    ) -> tuple[Tensor, ...]:
        kernels = _kernels()
        x = x.contiguous()
        before = x if first is None else first.to(x.dtype).contiguous()
        marks = x if starts is None else starts.to(torch.uint8).contiguous()
        stacked = torch.stack([c.to(x.dtype) for c in coefficients])
        ctx.options = {"count": len(coefficients), "has_first": first is not None, "has_starts": starts is not None}
        ctx.options["wide"] = _wide(x, kernels)
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
        kernels = _kernels()
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


class _NormBonusGate(torch.autograd.Function):
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
        kernels = _kernels()
        tensors = [x.contiguous() for x in (y, r, k, v, gate, weight, bias, r_k)]
        ctx.save_for_backward(*tensors)
        ctx.epsilon = epsilon
        s, batch, heads, n = y.shape
        out = torch.empty(s, batch, heads * n, dtype=v.dtype, device=v.device)
        if y.numel():
            kernels.finish_forward[(_blocks(s * batch, kernels.ROWS), heads)](
                *tensors, out, s * batch, heads, epsilon, n=n, wide=_wide(y, kernels), block_rows=kernels.ROWS
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels()
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
                wide=_wide(y, kernels), block_rows=kernels.ROWS, steps=kernels.STEPS,
            )  # fmt: skip
        dweight, dbias, dr_k = partial.sum(0)
        return *grads, dweight.to(weight.dtype), dbias.to(bias.dtype), dr_k.view_as(r_k).to(r_k.dtype), None


def _blocks(size: int, block: int) -> int:
    return max(1, -(-size // block))


def _filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernels have places for; those past the end are not touched."""
    return [*tensors, *([tensors[0]] * (6 - len(tensors)))]
