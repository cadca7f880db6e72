"""RWKV's token shift: what the previous token of the same document was (Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaforge.kernels.rwkv7_fused import previous_tokens, shifted_mixes
from megaforge.parallel.packed_sequence import PackedSequence


def token_shift(x_SBH: torch.Tensor, info: PackedSequence, shift_state: torch.Tensor | None = None) -> torch.Tensor:
    """Each token's predecessor, zero where a document starts.

    Args:
        x_SBH: [s, b, h], this rank's tokens of the sequence in order (inside a tensor-parallel region). Under context
            parallelism the last token of the chunk before each of them comes from the rank that holds it.
        info: the micro-batch's document boundaries.
        shift_state: [b, h], the token before ``x_SBH[0]`` when the sequence continues one seen earlier
            (generation). Position 0 then continues that document; only later boundaries reset.

    Returns:
        [s, b, h] of the dtype of ``x_SBH``. The state for the next call is ``x_SBH[-1]``.
    """
    return previous_tokens(x_SBH, *_before(x_SBH, info, shift_state))


def _before(
    x: torch.Tensor, info: PackedSequence, shift_state: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tokens before each of this rank's chunks [chunks, b, h], or None for zero before its only one; and where
    nothing comes before, bool [s, b], or None for nowhere."""
    starts = info.document_start_SB if info.has_boundaries else None
    if shift_state is not None:
        if starts is not None:
            starts = starts.clone()
            starts[0] = False  # it continues the state's document
        return shift_state.unsqueeze(0), starts
    if info.shards.axis.size == 1:
        return None, starts
    return info.shards.before(torch.stack([chunk[-1] for chunk in x.chunk(len(info.shards.chunks))])), starts


def shift_and_mix(
    x: torch.Tensor, info: PackedSequence, shift_state: torch.Tensor | None, coefficients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """:func:`token_shift` and, for each c of ``coefficients`` [h], ``x + (previous - x) * c``: one operator."""
    return shifted_mixes(x, *_before(x, info, shift_state), coefficients)
