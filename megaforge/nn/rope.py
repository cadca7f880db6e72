"""Rotary position embedding (Su et al., arXiv 2104.09864), on all or on the first channels of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.parallel.packed_sequence import PackedSequence


class _Rotate(torch.autograd.Function):
    """Rotates channel pairs (i, i + r/2) of the first r channels. Backward: rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotary_tables(info: PackedSequence, channels: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, [s, b, 1, channels / 2]; made once a micro-batch.

    Angles are taken in fp64, so that long positions keep their phase, and rounded once to ``dtype``.
    """
    key = ("rope", channels, base, dtype)
    if key not in info.shared:
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=info.position_ids_BS.device) / channels
        angles = info.position_ids_BS.t().unsqueeze(-1).to(torch.float64) * base**-exponent
        info.shared[key] = (angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2))
    return info.shared[key]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` channels of each head by its token's angles.

    Channel i pairs with i + r/2 (the layout of GPT-NeoX and Llama checkpoints). Relative angles alone reach the
    attention scores.

    Args:
        x: [s, b, heads, d].
        cos: [s, b, 1, r/2], of the dtype of ``x``.
        sin: the same.

    Returns:
        [s, b, heads, d], contiguous.
    """
    return _Rotate.apply(x, cos, sin)
