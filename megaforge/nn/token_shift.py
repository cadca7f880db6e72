"""RWKV's token shift: what the previous token of the same document was (Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaforge.kernels.rwkv7_fused import fused, mix_tokens, say_plain, shifted_mixes
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
    chunks = x_SBH.chunk(len(info.shards.chunks))
    if shift_state is not None:
        firsts = shift_state.to(x_SBH.dtype).unsqueeze(0)
    else:
        firsts = info.shards.before(torch.stack([chunk[-1] for chunk in chunks]))
    previous = torch.cat([part for n, chunk in enumerate(chunks) for part in (firsts[n : n + 1], chunk[:-1])])
    if info.has_boundaries:
        starts = info.document_start_SB
        if shift_state is not None:
            starts = starts.clone()
            starts[0] = False  # it continues the state's document
        previous = previous.masked_fill(starts.unsqueeze(-1), 0)
    return previous


def shift_and_mix(
    x: torch.Tensor, info: PackedSequence, shift_state: torch.Tensor | None, coefficients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """:func:`mix_tokens` of ``x`` and its :func:`token_shift`; where a rank has whole sequences one operator."""
    if len(info.shards.chunks) > 1 or info.shards.axis.size > 1:
        if fused(x):
            say_plain("the token shift needs whole sequences, which --cp cuts")
        return mix_tokens(x, token_shift(x, info, shift_state), coefficients)
    starts = info.document_start_SB if info.has_boundaries else None
    if starts is not None and shift_state is not None:
        starts = starts.clone()
        starts[0] = False  # it continues the state's document
    return shifted_mixes(x, shift_state, starts, coefficients)
