"""Noise that is the same at every layout: a hash of where a weight stands, not a random generator's next number."""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = (0x2C1B3C6D, 0x297A2D39)  # of Wellons' hash of 32 bits (lowbias32's family), below 2^31


def uniform(place: Tensor, seed: Tensor) -> Tensor:
    """Numbers in [-0.5, 0.5) for places.

    Args:
        place: int64, up to 2^32.
        seed: fp32, broadcasts to ``place``; other bits give other numbers.

    Returns:
        fp32, in the shape that both broadcast to.
    """
    bits = seed.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    x = (place ^ (bits * _ODD[1] & 0xFFFFFFFF)) & 0xFFFFFFFF
    for factor in _ODD:
        x = ((x ^ (x >> 15)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).float().mul_(2.0**-24).sub_(0.5)
