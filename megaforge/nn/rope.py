"""The angles of rotary position embedding (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.parallel.packed_sequence import PackedSequence


def rotary_tables(info: PackedSequence, channels: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, [s, b, 1, channels / 2]; made once a micro-batch.

    Angles are taken in fp64, so that long positions keep their phase, and rounded once to ``dtype``.
    """
    key = ("rope", channels, base, dtype)
    if key not in info.cache:
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=info.position_ids_BS.device) / channels
        angles = info.position_ids_BS.t().unsqueeze(-1).to(torch.float64) * base**-exponent
        info.cache[key] = (angles.cos().to(dtype).unsqueeze(2), angles.sin().to(dtype).unsqueeze(2))
    return info.cache[key]
