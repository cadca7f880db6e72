"""The definition of products with packed weights, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {"binary": 1, "ternary": 2, "int4": 4}
RANGES = {"binary": (-1, 1), "ternary": (-1, 1), "int4": (-8, 7)}
LEAST = 1e-5  # the least largest value that a token is divided by, as in BitNet's published code


# By the number of codes in a byte: the integers that hold as many, one in each byte, and the factor that brings the low
# bits of all of them side by side into the highest byte.
_TOGETHER = {
    8: (torch.int64, sum(1 << 56 - 7 * i for i in range(8)), 56),
    4: (torch.int32, sum(1 << 24 - 6 * i for i in range(4)), 24),
    2: (torch.int16, sum(1 << 8 - 4 * i for i in range(2)), 8),
}


def pack_codes(codes: Tensor, scheme: str) -> Tensor:
    """int8 [N, K] -> uint8 [N, ceil(K bits / 8)], the lowest bits first; bits beyond K are 0.

    Binary: bit 1 is +1, bit 0 is -1. Ternary: code + 1. int4: two's complement.
    """
    if codes.shape[-1] % (8 // BITS[scheme]) or not codes.numel():
        return _pack_any(codes, scheme)
    kind, factor, shift = _TOGETHER[8 // BITS[scheme]]
    low = {"binary": lambda: codes.clamp_min(0), "ternary": lambda: codes + 1, "int4": lambda: codes & 15}[scheme]()
    together = low.reshape(-1).view(kind).view(len(codes), -1)
    return together.mul_(factor).bitwise_right_shift_(shift).bitwise_and_(255).to(torch.uint8)


def _pack_any(codes: Tensor, scheme: str) -> Tensor:
    bits = BITS[scheme]
    low = {"binary": (codes + 1) >> 1, "ternary": codes + 1, "int4": codes & 15}[scheme]
    each = 8 // bits
    rows, columns = low.shape
    num_bytes = -(-columns // each)
    padded = low.new_zeros(rows, num_bytes * each, dtype=torch.int32)
    padded[:, :columns] = low
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (padded.view(rows, num_bytes, each) << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, scheme: str, columns: int) -> Tensor:
    """The inverse: int8 [N, columns]."""
    if columns % (8 // BITS[scheme]) or not packed.numel():
        return _unpack_any(packed, scheme, columns)
    bits = BITS[scheme]
    together = packed.to(_TOGETHER[8 // bits][0])
    half = each = 8 // bits
    while half > 1:  # halves of what stands together move apart, until each code has a byte
        half //= 2
        kept = sum((1 << half * bits) - 1 << 8 * place for place in range(0, each, half))
        together = (together | together << half * (8 - bits)) & kept
    low = together.contiguous().view(torch.int8)
    return {"binary": lambda: low * 2 - 1, "ternary": lambda: low - 1, "int4": lambda: (low ^ 8) - 8}[scheme]()


def _unpack_any(packed: Tensor, scheme: str, columns: int) -> Tensor:
    bits = BITS[scheme]
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32)
    low = ((packed.int().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :columns]
    values = {"binary": low * 2 - 1, "ternary": low - 1, "int4": (low ^ 8) - 8}[scheme]
    return values.to(torch.int8)


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """[..., K] -> codes int8 [..., K] and what a code is worth, [..., 1] in fp32 (fp64 of fp64).

    The factor is ``1 / largest * 127`` and not ``127 / largest``: torch computes BitNet's ``127 / largest`` so, and a
    true division gives another last bit. A token with NaN or infinite values has codes 0 and is worth NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    most = 2 ** (bits - 1) - 1
    largest = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    largest = largest.clamp(min=LEAST)
    finite = largest.isfinite()
    codes = (wide * (1.0 / largest * most)).round().clamp(-most - 1, most)
    codes = torch.where(finite, codes, torch.zeros_like(codes)).to(torch.int8)
    # By a tensor: GPUs multiply by the reciprocal of a number.
    return codes, torch.where(finite, largest / torch.full_like(largest, most), torch.nan)


def exact_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """Integer products and sums of int8 [M, K] and int8 [N, K] -> [M, N], exact, as fp32 or fp64."""
    # |sum| <= 128 * 8 * K must not pass 2^24 for fp32 to be exact.
    kind = torch.float32 if codes.shape[1] <= 2**14 else torch.float64
    return codes.to(kind) @ weight.to(kind).t()


def product(
    codes: Tensor, worth: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(sums * scale) * worth + bias`` in fp32, then rounded to ``dtype``; with groups the sums of one group after the
    other are scaled and added.

    Args:
        codes: int8 [M, K], of activations.
        worth: fp32 [M, 1], what they are worth.
        weight: int8 [N, K], of weights.
        scale: fp32 [], [N] or [N, K / group].
        bias: [N].

    Returns:
        [M, N].
    """
    if scale.dim() < 2:
        total = exact_sums(codes, weight).float() * scale
    else:
        total = worth.new_zeros(codes.shape[0], weight.shape[0])
        size = codes.shape[1] // scale.shape[1]
        for i in range(scale.shape[1]):
            part = slice(i * size, (i + 1) * size)
            total = total + exact_sums(codes[:, part], weight[:, part]).float() * scale[:, i]
    total = total * worth
    return (total if bias is None else total + bias.float()).to(dtype)
