"""RWKV-7's arithmetic around its projections and its recurrence.

:func:`shifted_mixes` is the token shift with the mixes that the projections read, :func:`rwkv7_inputs` what lies
between them and WKV-7, :func:`norm_bonus_gate` what follows it. On GPUs the first and the last are Triton kernels, one
pass over the tokens each way (:mod:`.triton`). The second, and the mixes elsewhere, are such a walk in plain torch, on
a CPU in pieces that stay in cache (:mod:`.inputs`, :mod:`.mixes`). :mod:`.reference` has the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.kernels.native import say_fallback
from megaforge.kernels.rwkv7_fused.inputs import RWKV7Inputs
from megaforge.kernels.rwkv7_fused.mixes import MixTokens
from megaforge.kernels.rwkv7_fused.reference import (
    norm_bonus_gate_reference,
    previous_tokens,
    rwkv7_inputs_reference,
    shifted_mixes_reference,
)
from megaforge.kernels.rwkv7_fused.triton import NormBonusGate, ShiftedMixes, load_triton

__all__ = [
    "fused", "mix_tokens", "norm_bonus_gate", "norm_bonus_gate_reference", "rwkv7_inputs", "rwkv7_inputs_reference",
    "say_plain", "shifted_mixes", "shifted_mixes_reference",
]  # fmt: skip
HEAD_SIZES = (16, 32, 64, 128)


def say_plain(reason: str) -> None:
    """Says, once a process and on rank 0 alone, that a GPU computes in plain torch, and why."""
    say_fallback("rwkv7 around its recurrence", f"no Triton kernel ({reason})")


def fused(x: Tensor) -> bool:
    """Whether tensors like ``x`` go through the Triton kernels."""
    if x.device.type != "cuda":
        return False
    if x.dtype == torch.float64:
        say_plain("they compute in fp32 at most, not in fp64")
        return False
    kernels, missing = load_triton()
    if kernels is None:
        say_plain(missing)
    return kernels is not None


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
        return ShiftedMixes.apply(x, first, starts, *coefficients)
    return mix_tokens(x, previous_tokens(x, first, starts), coefficients)


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
    outputs = RWKV7Inputs.apply(decay, w0, rate, a0, key, k_k, k_a, head_size)
    log_w, k, a, b = (x.view(heads) for x in outputs)
    return log_w, k, a, b


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
        return NormBonusGate.apply(y, r, k, v, gate, weight, bias, r_k, epsilon)
    return norm_bonus_gate_reference(y, r, k, v, gate, weight, bias, r_k, epsilon)
