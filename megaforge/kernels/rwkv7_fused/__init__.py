"""RWKV-7's arithmetic around its projections and its recurrence.

:func:`shifted_mixes` is the token shift with the mixes that the projections read, :func:`rwkv7_inputs` what lies
between them and WKV-7, :func:`mix_values` the mix with the first layer's values, :func:`norm_bonus_gate` what follows
WKV-7. On GPUs each is a Triton kernel, one pass over the tokens each way (:mod:`.triton`). Elsewhere the first two are
such a walk in plain torch, on a CPU in pieces that stay in cache (:mod:`.inputs`, :mod:`.mixes`). :mod:`.reference` has
the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.kernels.native import say_no_triton, takes_triton
from megaforge.kernels.rwkv7_fused.inputs import RWKV7Inputs
from megaforge.kernels.rwkv7_fused.mixes import MixTokens
from megaforge.kernels.rwkv7_fused.reference import (
    mix_values_reference,
    norm_bonus_gate_reference,
    previous_tokens,
    rwkv7_inputs_reference,
    shifted_mixes_reference,
)
from megaforge.kernels.rwkv7_fused.triton import FusedInputs, MixValues, NormBonusGate, ShiftedMixes

__all__ = [
    "fused", "mix_tokens", "mix_values", "mix_values_reference", "norm_bonus_gate", "norm_bonus_gate_reference",
    "previous_tokens", "rwkv7_inputs", "rwkv7_inputs_reference", "shifted_mixes", "shifted_mixes_reference",
]  # fmt: skip
WHAT = "rwkv7 around its recurrence"
HEAD_SIZES = (16, 32, 64, 128)


def fused(x: Tensor) -> bool:
    """Whether tensors like ``x`` go through the Triton kernels."""
    return takes_triton("rwkv7_fused", WHAT, x)


def _fused_heads(x: Tensor, head_size: int) -> bool:
    """:func:`fused`, and the kernels have heads of this size."""
    if not fused(x):
        return False
    if head_size not in HEAD_SIZES:
        say_no_triton(WHAT, f"heads have {head_size} channels, not one of {', '.join(map(str, HEAD_SIZES))}")
    return head_size in HEAD_SIZES


def shifted_mixes(
    x: Tensor, first: Tensor | None, starts: Tensor | None, coefficients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """``x + (previous - x) * c`` for each c, with ``previous`` the token before in the same document.

    Args:
        x: [s, b, h].
        first: [n, b, h], the tokens before each of the n chunks of equal length that ``x`` consists of; None: zero
            before the only one.
        starts: bool [s, b], true where nothing comes before; None: nowhere.
        coefficients: at most six, each [h]; may be wider than ``x``.

    Returns:
        One [s, b, h] of the dtype of ``x`` for each coefficient.
    """
    if fused(x):
        return ShiftedMixes.apply(x, first, starts, *coefficients)
    previous = previous_tokens(x, first, starts)
    if len(coefficients) == 1:  # keeps one tensor, where MixTokens keeps two for any number of mixes
        return (torch.addcmul(x, previous - x, coefficients[0].to(x.dtype)),)
    return mix_tokens(x, previous, coefficients)


def mix_tokens(x: Tensor, previous: Tensor, coefficients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``x + (previous - x) * c`` for each coefficient vector c [h]: the inputs of RWKV's projections.

    Args:
        x: [s, b, h].
        previous: [s, b, h], the token before each in the same document, or zero.
        coefficients: each [h]; may be wider than ``x``.

    Returns:
        One [s, b, h] of the dtype of ``x`` for each coefficient.
    """
    return MixTokens.apply(x, previous, *coefficients)


def rwkv7_inputs(
    decay: Tensor, w0: Tensor, rate: Tensor, a0: Tensor, key: Tensor, k_k: Tensor, k_a: Tensor, head_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What WKV-7 takes besides r and v (RWKV-LM, x070).

    Args:
        decay, rate, key: [s, b, C]: outputs of the decay LoRA, of the in-context-learning-rate LoRA, of W_k.
        w0, a0, k_k, k_a: [C], fp32 (fp64 for fp64 inputs).
        head_size: N.

    Returns:
        log_w (fp32 or fp64), k, a and b, each [s, b, H, N]: with ``lr = sigmoid(a0 + rate)`` and
        ``kk = normalize(key * k_k)`` over each head, ``k = key * (1 + (lr - 1) * k_a)``, ``a = -kk``, ``b = kk * lr``.
        The arithmetic is done in the precision of the vectors; k, a and b are rounded to the dtype of ``key``.
    """
    heads = (*key.shape[:-1], key.shape[-1] // head_size, head_size)
    function = FusedInputs if _fused_heads(key, head_size) else RWKV7Inputs
    outputs = function.apply(decay, w0, rate, a0, key, k_k, k_a, head_size)
    log_w, k, a, b = (x.view(heads) for x in outputs)
    return log_w, k, a, b


def mix_values(v: Tensor, v_first: Tensor, rate: Tensor, v0: Tensor) -> Tensor:
    """``v + (v_first - v) * sigmoid(v0 + rate)``: a layer's values mixed with those of the first layer (RWKV-LM, x070).

    Args:
        v, v_first, rate: [..., C].
        v0: [C], fp32 (fp64 for fp64 inputs).

    Returns:
        Like ``v``.
    """
    return MixValues.apply(v, v_first, rate, v0) if fused(v) else mix_values_reference(v, v_first, rate, v0)


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
    if _fused_heads(y, y.shape[-1]):
        return NormBonusGate.apply(y, r, k, v, gate, weight, bias, r_k, epsilon)
    return norm_bonus_gate_reference(y, r, k, v, gate, weight, bias, r_k, epsilon)
