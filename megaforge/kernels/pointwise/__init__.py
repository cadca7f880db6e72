"""What a layer does with each token between its products: norm, activation, rotation.

On CPUs norms and activations are compiled (:mod:`.native`), on GPUs they are Triton kernels (:mod:`.triton`).
:mod:`.functions` is plain torch that keeps less for the backward pass than autograd would; :mod:`.reference` has the
definitions, which torch.compile makes kernels of its own of (``--compile``).
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.kernels.pointwise import native, triton
from megaforge.kernels.pointwise.functions import RMSNorm, Rotate, SquaredReLU, SwiGLU
from megaforge.kernels.pointwise.reference import (
    apply_rotary_reference,
    gated_squared_relu_reference,
    layer_norm_reference,
    rms_norm_reference,
    squared_relu_reference,
    swiglu_reference,
)

__all__ = [
    "apply_rotary",
    "gated_squared_relu",
    "layer_norm",
    "rms_norm",
    "squared_relu",
    "stream_layer_norm",
    "stream_rms_norm",
    "swiglu",
    "weighted_activation",
]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [..., h], any float dtype.
        weight: [h], fp32 (fp64 for fp64 ``x``); the arithmetic is done in its dtype.
        epsilon: added to the mean square.

    Returns:
        [..., h] of the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, epsilon)
    if triton.takes_rows(x):
        return triton.Norm.apply(x, weight, None, epsilon, False)
    if native.takes(x, weight):
        return native.Norm.apply(x, weight, None, epsilon, False)
    return RMSNorm.apply(x, weight, epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al., arXiv 1607.06450).

    Args:
        x: [..., h], any float dtype.
        weight, bias: [h], fp32 (fp64 for fp64 ``x``); the arithmetic is done in their dtype.
        epsilon: added to the variance.

    Returns:
        [..., h] of the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        return layer_norm_reference(x, weight, bias, epsilon)
    if triton.takes_rows(x):
        return triton.Norm.apply(x, weight, bias, epsilon, True)
    if native.takes(x, weight, bias):
        return native.Norm.apply(x, weight, bias, epsilon, True)
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, epsilon).to(x.dtype)


def stream_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` of a residual stream, where it is read and goes on: the addition in front of it, and that of
    both gradients behind it, are part of its passes.

    Args:
        x: [..., h], any float dtype.
        update: [..., h], what is added to the stream before; None: nothing.

    Returns:
        The norm of ``x + update``, and ``x + update``.
    """
    if (form := _stream_form(x, update, weight)) is not None:
        return form.StreamNorm.apply(x, update, weight, None, epsilon, False)
    stream = x if update is None else x + update
    return rms_norm(stream, weight, epsilon), stream


def stream_layer_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm` of a residual stream, as :func:`stream_rms_norm`."""
    if (form := _stream_form(x, update, weight, bias)) is not None:
        return form.StreamNorm.apply(x, update, weight, bias, epsilon, True)
    stream = x if update is None else x + update
    return layer_norm(stream, weight, bias, epsilon), stream


def _stream_form(x: Tensor, update: Tensor | None, *vectors: Tensor) -> ModuleType | None:
    """Whose norm adds to a stream, where one takes these."""
    if torch.compiler.is_compiling() or (update is not None and (update.shape, update.dtype) != (x.shape, x.dtype)):
        return None
    if triton.takes_rows(x):
        return triton
    return native if native.takes(x, *vectors) else None


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al., arXiv 2109.08668): [...] -> [...]."""
    if torch.compiler.is_compiling():
        return squared_relu_reference(x)
    if triton.takes(x):
        return triton.SquaredReLU.apply(x)
    return native.SquaredReLU.apply(x) if native.takes(x) else SquaredReLU.apply(x)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202): [..., 2f], gate before up -> [..., f]."""
    if torch.compiler.is_compiling():
        return swiglu_reference(x)
    if triton.takes(x):
        return triton.Gated.apply(x, False)
    return native.Gated.apply(x, native.SILU) if native.takes(x) else SwiGLU.apply(x)


def gated_squared_relu(x: Tensor) -> Tensor:
    """``max(gate, 0)^2 * up`` (BitNet b1.58 2B4T, arXiv 2504.12285): [..., 2f], gate before up -> [..., f]."""
    if torch.compiler.is_compiling():
        return gated_squared_relu_reference(x)
    if triton.takes(x):
        return triton.Gated.apply(x, True)
    if native.takes(x):
        return native.Gated.apply(x, native.SQUARED_RELU)
    gate, up = x.chunk(2, dim=-1)
    return squared_relu(gate) * up


def weighted_activation(x: Tensor, weights: Tensor, *, squared: bool, gated: bool) -> Tensor:
    """:func:`squared_relu`, :func:`swiglu` or :func:`gated_squared_relu` of rows that have a weight each, as those of
    experts have.

    Args:
        x: [R, f], or gated [R, 2f].
        weights: [R], of any float dtype.
        squared: the activation is squared ReLU, and not SiLU, which is always gated.

    Returns:
        [R, f] of the dtype of ``x``: the activation times its row's weight.
    """
    if triton.takes(x):
        return triton.Weighted.apply(x, weights, squared, gated)
    if not torch.compiler.is_compiling() and native.takes(x):
        return native.Weighted.apply(x, weights, native.SQUARED_RELU if squared else native.SILU, gated)
    activated = squared_relu(x) if not gated else gated_squared_relu(x) if squared else swiglu(x)
    return activated * weights.to(x.dtype).unsqueeze(1)


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
    if torch.compiler.is_compiling():
        return apply_rotary_reference(x, cos, sin)
    return triton.Rotate.apply(x, cos, sin) if triton.takes(x) else Rotate.apply(x, cos, sin)
