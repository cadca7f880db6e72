"""What a layer does with each token between its products: norm, activation, rotation.

:mod:`.triton` has kernels of GPUs, :mod:`.functions` plain torch that keeps less for the backward pass than autograd
would, :mod:`.reference` the definitions.
"""

from __future__ import annotations

from torch import Tensor

from megaforge.kernels.pointwise import triton
from megaforge.kernels.pointwise.functions import RMSNorm, Rotate, SquaredReLU, SwiGLU

__all__ = ["apply_rotary", "rms_norm", "squared_relu", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [..., h], any float dtype.
        weight: [h], fp32 (fp64 for fp64 ``x``); the arithmetic is done in its dtype.
        epsilon: added to the mean square.

    Returns:
        [..., h] of the dtype of ``x``.
    """
    if triton.takes_rows(x):
        return triton.Norm.apply(x, weight, None, epsilon, False)
    return RMSNorm.apply(x, weight, epsilon)


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al., arXiv 2109.08668): [...] -> [...]."""
    return triton.SquaredReLU.apply(x) if triton.takes(x) else SquaredReLU.apply(x)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202): [..., 2f], gate before up -> [..., f]."""
    return triton.Gated.apply(x, False) if triton.takes(x) else SwiGLU.apply(x)


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
    return triton.Rotate.apply(x, cos, sin) if triton.takes(x) else Rotate.apply(x, cos, sin)
