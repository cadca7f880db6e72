"""Matrices in 4 bits (QLoRA: Dettmers et al., arXiv 2305.14314): a code for each weight, a scale for each block of
neighbours in a row, and with double quantization 8 bits for each scale.

Bytes are those of bitsandbytes' ``quantize_4bit`` on the CPU: two codes a byte, the first in the upper half.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.errors import UserError

NESTED_BLOCK = 256  # scales that share one of the second order
_STEPS, _TINY = 65535, 1e-38

# Quantiles of the normal distribution, scaled to [-1, 1] (bitsandbytes' create_normal_map, which ships these numbers).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_LEVELS = {"nf4": _NF4, "int4": tuple(code / 7 for code in range(-8, 8))}  # of int4 the first is never chosen


class FourBits(NamedTuple):
    """A matrix [out, in] in 4 bits.

    Attributes:
        codes: uint8 [out, in / 2].
        scales: of blocks [out, in / block]: fp32 or, with double quantization, uint8.
        nested: fp32 [blocks of scales]: what the largest code of each stands for; empty without double quantization.
        offset: fp32 [1], added to every scale; empty likewise.
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor
    offset: Tensor


@lru_cache(maxsize=8)
def levels(kind: str, device: torch.device) -> Tensor:
    """fp32 [16], ascending: what codes stand for in a block whose largest magnitude is 1."""
    return torch.tensor(_LEVELS[kind], dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _level_pairs(kind: str, device: torch.device) -> Tensor:
    """fp32 [256, 2]: what the two codes of a byte stand for."""
    one = levels(kind, device)
    return torch.stack((one.repeat_interleave(16), one.repeat(16)), 1)


@lru_cache(maxsize=4)
def dynamic_levels(device: torch.device) -> Tensor:
    """fp32 [256], ascending: the 8-bit dynamic type with signs (Dettmers, arXiv 1511.04561): seven decades below 1, of
    which each has twice as many levels as the one below."""
    found = [0.0, 1.0]
    for place in range(7):
        edges = torch.linspace(0.1, 1, 2**place + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        found += (10 ** (place - 6) * means).tolist() + (-(10 ** (place - 6)) * means).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@lru_cache(maxsize=4)
def _dynamic_codes(device: torch.device) -> Tensor:
    """uint8 [_STEPS + 1]: the nearest of :func:`dynamic_levels` to so many equal steps from -1 to 1."""
    steps = torch.arange(_STEPS + 1, dtype=torch.float32, device=device) / _STEPS * 2 - 1
    return _nearest(steps, dynamic_levels(device))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 places in the ascending ``table``; of two that are as near the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)


def _scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [.., size] in [-1, 1], and the largest magnitudes [..]. A block of zeros has the scale 0."""
    largest = blocks.abs().amax(-1)
    return (blocks * (1.0 / largest.clamp(min=_TINY)).unsqueeze(-1)).clamp(-1, 1), largest


@torch.no_grad()
def quantize(weight: Tensor, kind: str, block: int, *, double: bool) -> FourBits:
    """``weight`` [out, in], of any float type, in 4 bits; ``block`` divides its rows.

    Raises:
        UserError: it has values that are not finite, or larger than fp32 can sum.
    """
    rows, width = weight.shape
    values, scales = _scaled(weight.float().reshape(rows, width // block, block))
    if not torch.isfinite(scales.sum()):
        raise UserError("--peft qlora: a matrix has values that are not finite, or too large for fp32")
    codes = _nearest(values, levels(kind, weight.device)).view(rows, width)
    packed = (codes[:, ::2] << 4) | codes[:, 1::2]
    if not double:
        nothing = scales.new_empty(0)
        return FourBits(packed, scales, nothing, nothing)
    offset = scales.view(-1).mean()
    flat = scales.view(-1) - offset
    missing = -len(flat) % NESTED_BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, NESTED_BLOCK)
    values, nested = _scaled(blocks)
    coded = _dynamic_codes(weight.device)[((values + 1) * 0.5 * _STEPS + 0.5).int()]  # its CPU kernel rounds so first
    return FourBits(packed, coded.view(-1)[: len(flat)].view_as(scales), nested, offset.view(1))


def dequantize_scales(scales: Tensor, nested: Tensor, offset: Tensor, places: Tensor) -> Tensor:
    """fp32 scales of uint8 ones [(E,) rows, columns], whose places among all of their matrix are ``places``, int64
    [rows, columns]; the rest is as in :class:`FourBits`, and broadcasts."""
    return dynamic_levels(scales.device)[scales.int()] * nested[..., places // NESTED_BLOCK] + offset


def dequantize(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """fp32 [.., in] of codes [.., in / 2] and fp32 scales [.., in / block]."""
    values = torch.nn.functional.embedding(codes.int(), _level_pairs(kind, codes.device))
    *rows, halves, _ = values.shape
    values.view(*rows, scales.shape[-1], -1).mul_(scales.unsqueeze(-1))  # in place: the wide matrix is there once
    return values.view(*rows, 2 * halves)
