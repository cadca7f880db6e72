"""How Hugging Face's ``bitnet`` checkpoints pack ternary matrices (transformers, integrations/bitnet.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(codes: Tensor) -> Tensor:
    """Four rows in one, 2 bits each: byte [r, k] has row r + i N/4 in its bits 2i and 2i + 1, as code + 1.

    Args:
        codes: int8 [N, K] of -1, 0 and 1.

    Returns:
        uint8 [N/4, K].

    Raises:
        ValueError: N is not a multiple of 4: transformers makes room for N // 4 rows; or a code is none of the three.
    """
    rows, columns = codes.shape
    if rows % 4:
        raise ValueError(f"{rows} rows are not a multiple of 4")
    if codes.numel() and int(codes.abs().max()) > 1:
        raise ValueError("a code is not -1, 0 or 1")
    parts = (codes + 1).to(torch.uint8).view(4, rows // 4, columns)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse: uint8 [N/4, K] -> int8 [N, K]."""
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)]).to(torch.int8) - 1
