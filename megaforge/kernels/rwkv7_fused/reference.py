"""The definitions of RWKV-7's arithmetic around its projections, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DECAY_SCALE = -math.exp(-0.5)  # log w = DECAY_SCALE * sigmoid(.), so w > exp(-exp(-0.5)) = 0.5452
NORM_EPSILON = 1e-12


def previous_tokens(x: Tensor, first: Tensor | None, starts: Tensor | None) -> Tensor:
    """The token before each [s, b, h]; arguments as :func:`megaforge.kernels.rwkv7_fused.shifted_mixes`."""
    before = torch.zeros_like(x[:1]) if first is None else first.to(x.dtype)
    chunks = [x] if first is None else x.chunk(len(first))
    previous = torch.cat([part for n, chunk in enumerate(chunks) for part in (before[n : n + 1], chunk[:-1])])
    return previous if starts is None else previous.masked_fill(starts.unsqueeze(-1), 0)


def shifted_mixes_reference(
    x: Tensor, first: Tensor | None, starts: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The definition of :func:`megaforge.kernels.rwkv7_fused.shifted_mixes`."""
    previous = previous_tokens(x, first, starts)
    return tuple(torch.lerp(x, previous, c.to(x.dtype)) for c in coefficients)


def rwkv7_inputs_reference(
    decay: Tensor, w0: Tensor, rate: Tensor, a0: Tensor, key: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition; arguments and results as :func:`megaforge.kernels.rwkv7_fused.rwkv7_inputs`."""
    heads = (*key.shape[:-1], key.shape[-1] // head_size, head_size)
    log_w = DECAY_SCALE * torch.sigmoid(w0 + decay)
    lr = torch.sigmoid(a0 + rate)
    kk = F.normalize((key * k_k).view(heads), dim=-1, eps=NORM_EPSILON)
    k = key * (1 + (lr - 1) * k_a)
    return log_w.view(heads), k.to(key.dtype).view(heads), -kk.to(key.dtype), (kk * lr.view(heads)).to(key.dtype)


def mix_values_reference(v: Tensor, v_first: Tensor, rate: Tensor, v0: Tensor) -> Tensor:
    """The definition of :func:`megaforge.kernels.rwkv7_fused.mix_values`."""
    return v + (v_first - v) * torch.sigmoid(v0 + rate).to(v.dtype)


def norm_bonus_gate_reference(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, epsilon: float
) -> Tensor:
    """The definition of :func:`megaforge.kernels.rwkv7_fused.norm_bonus_gate`."""
    normed = F.layer_norm(y.to(r_k.dtype), (y.shape[-1],), eps=epsilon).flatten(2)
    normed = torch.addcmul(bias, normed, weight)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (normed + bonus.flatten(2)).to(v.dtype) * gate
