"""The definitions of pointwise operators; arguments and results as :mod:`megaforge.kernels.pointwise`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight``."""
    wide = x.to(weight.dtype)
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * weight + bias``."""
    wide = x.to(weight.dtype)
    apart = wide - wide.mean(-1, keepdim=True)
    return (apart * (apart.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight + bias).to(x.dtype)


def squared_relu_reference(x: Tensor) -> Tensor:
    """``max(x, 0)^2``."""
    return x.relu().square()


def swiglu_reference(x: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_squared_relu_reference(x: Tensor) -> Tensor:
    """``max(gate, 0)^2 * up``."""
    gate, up = x.chunk(2, dim=-1)
    return gate.relu().square() * up


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, turned."""
    first, second, rest = x.tensor_split([cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
