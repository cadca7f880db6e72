"""Products of a matrix with a few vectors, as decoding makes them: as fast as the matrix is read.

torch's CPU products of one row run on one thread, and those of two to eight rows far below the memory's speed.
:mod:`.reference` is the definition. Sums are fp32; a result depends on how many vectors there are, up to rounding, and
not on the number of threads. Nothing here is differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.gemv import native

__all__ = ["MOST_VECTORS", "gemv", "is_compiled"]

MOST_VECTORS = 8  # more are a matrix product, where torch's is better
TYPES = (torch.float32, torch.bfloat16)


def is_compiled(device_type: str) -> bool:
    """Whether there is compiled code for devices of this type."""
    return device_type != "meta" and device_type in native.COMPILED


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [..., k]; up to :data:`MOST_VECTORS` vectors are what this is made for, more are torch's.
        weight: [n, k] or the transpose of [k, n], of the type of ``x``; fp32 and bf16 have compiled code.
        bias: [n].

    Returns:
        [..., n] in the type of ``x``.
    """
    vectors = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not (0 < vectors <= MOST_VECTORS and x.dtype in TYPES and x.dtype == weight.dtype):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        result: Tensor = native.GEMV(x, weight, bias)
        return result
    flat: Tensor = native.GEMV(x.reshape(-1, x.shape[-1]), weight, bias)
    return flat.view(*x.shape[:-1], weight.shape[0])
