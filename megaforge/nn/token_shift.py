"""RWKV's token shift: what the previous token of the same document was (Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

import torch

from megaforge.nn.sequence import SequenceInfo


def token_shift(x_SBH: torch.Tensor, info: SequenceInfo, shift_state: torch.Tensor | None = None) -> torch.Tensor:
    """Each token's predecessor, zero where a document starts.

    Args:
        x_SBH: [s, b, h], every token of the sequence in order (inside a tensor-parallel region).
        info: the micro-batch's document boundaries.
        shift_state: [b, h], the token before ``x_SBH[0]`` when the sequence continues one seen earlier
            (generation). Position 0 then continues that document; only later boundaries reset.

    Returns:
        [s, b, h] of the dtype of ``x_SBH``. The state for the next call is ``x_SBH[-1]``.
    """
    first = torch.zeros_like(x_SBH[:1]) if shift_state is None else shift_state.to(x_SBH.dtype).unsqueeze(0)
    previous = torch.cat([first, x_SBH[:-1]])
    if info.has_boundaries:
        starts = info.document_start_SB.clone()
        starts[0] = False  # position 0 already holds zero or the state
        previous = previous.masked_fill(starts.unsqueeze(-1), 0)
    return previous
