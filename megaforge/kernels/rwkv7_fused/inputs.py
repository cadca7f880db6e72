"""RWKV-7's arithmetic between its projections and WKV-7 in one walk over the tokens each way, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.rwkv7_fused.reference import DECAY_SCALE, NORM_EPSILON

CPU_ELEMENTS_AT_ONCE = 1 << 16  # of [tokens, channels]: what the dozen intermediates of a step need stays in cache


def _rows(x: Tensor) -> Iterator[slice]:
    """Slices of the tokens of ``x`` [tokens, C]: a few at a time on a CPU, all at once on a GPU."""
    step = max(1, CPU_ELEMENTS_AT_ONCE // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _normalized(x: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """``x`` [tokens, C] with every head at norm one, [tokens, H, N], and the heads' norms [tokens, H, 1]."""
    x = x.unflatten(-1, (-1, head_size))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(NORM_EPSILON)
    return x / norm, norm


class RWKV7Inputs(torch.autograd.Function):
    """Forward: :func:`rwkv7_inputs_reference`. Backward: its gradients from the inputs alone; on a CPU both go through
    the tokens in pieces that stay in cache."""

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
        ctx.save_for_backward(decay, w0, rate, a0, key, k_k, k_a)
        ctx.head_size = head_size
        log_w = torch.empty(decay.shape, dtype=w0.dtype, device=decay.device)
        outputs = (log_w, *(torch.empty_like(key) for _ in range(3)))
        inputs = [x.flatten(0, -2) for x in (decay, rate, key)]
        out_log_w, out_k, out_a, out_b = (x.flatten(0, -2) for x in outputs)
        for rows in _rows(inputs[2]):
            d, lr, k = (x[rows].to(w0.dtype) for x in inputs)
            out_log_w[rows] = (d + w0).sigmoid_().mul_(DECAY_SCALE)
            lr = (lr + a0).sigmoid_()
            kk = _normalized(k * k_k, head_size)[0].flatten(-2)
            out_k[rows] = (lr - 1).mul_(k_a).add_(1).mul_(k)
            torch.neg(kk.to(out_a.dtype), out=out_a[rows])
            out_b[rows] = kk.mul_(lr)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        decay, w0, rate, a0, key, k_k, k_a = ctx.saved_tensors
        inputs = [x.flatten(0, -2) for x in (decay, rate, key)]
        grads = tuple(x.flatten(0, -2) for x in grads)
        out = [torch.empty_like(x) for x in inputs]
        sums = torch.zeros(4, w0.shape[0], dtype=w0.dtype, device=w0.device)
        for rows in _rows(inputs[2]):
            d, lr, k = (x[rows].to(w0.dtype) for x in inputs)
            dlog_w, dk, da, db = (x[rows].to(w0.dtype) for x in grads)
            d, lr = (d + w0).sigmoid_(), (lr + a0).sigmoid_()
            ddecay = (1 - d).mul_(d).mul_(dlog_w).mul_(DECAY_SCALE)
            kk, norm = _normalized(k * k_k, ctx.head_size)
            dkk = (db * lr).sub_(da).unflatten(-1, (-1, ctx.head_size))
            along = (dkk * kk).sum(-1, keepdim=True).mul_(norm > NORM_EPSILON)
            du = dkk.addcmul_(along, kk, value=-1).div_(norm).flatten(-2)
            kdk = k * dk
            dlr = (db * kk.flatten(-2)).addcmul_(kdk, k_a)
            drate = (1 - lr).mul_(lr).mul_(dlr)
            for total, part in zip(sums, (ddecay, drate, du * k, (lr - 1).mul_(kdk)), strict=True):
                total += part.sum(0)
            dkey = (lr - 1).mul_(k_a).add_(1).mul_(dk).addcmul_(du, k_k)
            for whole, part in zip(out, (ddecay, drate, dkey), strict=True):
                whole[rows] = part
        ddecay, drate, dkey = (x.view(key.shape) for x in out)
        return ddecay, sums[0], drate, sums[1], dkey, sums[2], sums[3], None
