"""RWKV's token shift: what the previous token of the same document was (Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megaforge.kernels.rwkv7_fused import fused, say_plain, shifted_mixes
from megaforge.parallel.packed_sequence import PackedSequence

CPU_ELEMENTS_AT_ONCE = 1 << 16  # of [s, b, h] in the backward pass of the mix


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
    """:func:`mix_tokens` of ``x`` and its :func:`token_shift`; on a GPU one pass, where a rank has whole sequences."""
    in_parts = len(info.shards.chunks) > 1 or info.shards.axis.size > 1
    if not fused(x) or in_parts:
        if fused(x):
            say_plain("the token shift needs whole sequences, which --cp cuts")
        return mix_tokens(x, token_shift(x, info, shift_state), coefficients)
    starts = info.document_start_SB if info.has_boundaries else None
    if starts is not None and shift_state is not None:
        starts = starts.clone()
        starts[0] = False  # it continues the state's document
    return shifted_mixes(x, shift_state, starts, coefficients)


def mix_tokens(
    x: torch.Tensor, previous: torch.Tensor, coefficients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """``x + (previous - x) * c`` for each coefficient vector c [h]: the inputs of RWKV's projections.

    Args:
        x: [s, b, h].
        previous: [s, b, h], as :func:`token_shift` gives it.
        coefficients: each [h]; may be wider than ``x``.

    Returns:
        One [s, b, h] of the dtype of ``x`` for each coefficient.
    """
    return _MixTokens.apply(x, previous, *coefficients)


class _MixTokens(torch.autograd.Function):
    """Forward: ``x + (previous - x) * c`` for several c. Backward: their gradients together, in one walk over the
    tokens, with the sums over tokens in fp32 (fp64 for fp64); keeps x and previous only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, previous: torch.Tensor, *coefficients: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, previous, *coefficients)
        return tuple(torch.lerp(x, previous, c.to(x.dtype)) for c in coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, previous, *coefficients = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        narrow = [c.to(x.dtype) for c in coefficients]
        dx, dprevious = torch.empty_like(x), torch.empty_like(x)
        dc = [torch.zeros(c.shape, dtype=wide, device=c.device) for c in coefficients]
        # On a CPU a few tokens at a time, which stay in cache; on a GPU all at once.
        step = max(1, CPU_ELEMENTS_AT_ONCE // x[0].numel()) if x.device.type == "cpu" else x.shape[0]
        for rows in (slice(start, start + step) for start in range(0, x.shape[0], step)):
            difference = previous[rows].to(wide) - x[rows]
            both, onto_previous = torch.zeros_like(difference), torch.zeros_like(difference)
            for grad, c, total in zip(grads, narrow, dc, strict=True):
                piece = grad[rows].to(wide)
                both += piece
                onto_previous.addcmul_(piece, c)
                total += (piece * difference).sum((0, 1))
            dprevious[rows] = onto_previous
            dx[rows] = both.sub_(onto_previous)
        return dx, dprevious, *(total.to(c.dtype) for total, c in zip(dc, coefficients, strict=True))
