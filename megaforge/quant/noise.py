"""Noise that is the same at every layout: a hash of where a weight stands, not a random generator's next number."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 15  # numbers: what a CPU's nearest caches hold
_ODD = (0x2C1B3C6D, 0x297A2D39)  # of Wellons' hash of 32 bits (lowbias32's family), below 2^31


def uniform(place: Tensor, seed: Tensor) -> Tensor:
    """Numbers in [-0.5, 0.5) for places.

    Args:
        place: int32 or int64; the low 32 bits count.
        seed: fp32, broadcasts to ``place``; other bits give other numbers.

    Returns:
        fp32, in the shape that both broadcast to.
    """
    shape = torch.broadcast_shapes(place.shape, seed.shape)
    out = torch.empty(shape, device=place.device)
    bits = seed.float().contiguous().view(torch.int32) * _ODD[1]
    pieces = [out, *(part.expand(shape) for part in (place, bits))]
    if len(shape) > 1:
        rows = [part.flatten(0, -2) for part in pieces]  # copies small ones alone: of steps with one for each row
        size = max(1, _AT_ONCE // max(1, shape[-1])) if place.device.type == "cpu" else max(1, len(rows[0]))
        parts = list(zip(*(part.split(size) for part in rows), strict=True))
    else:
        parts = [tuple(pieces)]
    for some, where, start in parts:  # 32-bit integers that wrap around; each shift brings in zeros
        x = where.to(torch.int32).bitwise_xor(start)
        for factor in _ODD:
            x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(factor)
        x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
        some.copy_(x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)).mul_(2.0**-24).sub_(0.5)
    return out
