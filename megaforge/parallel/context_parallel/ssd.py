"""Mamba-2's recurrence over sequences that the ranks of cp share: every chunk starts from the state that all chunks
before it leave.

A chunk takes the state S before it to ``k S + Q``, with a number k a head. Only k and Q are exchanged, and every rank
combines them in the order of the chunks; the backward pass is that of these steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.ssd import chunks_of, ssd
from megaforge.parallel.context_parallel.shard import ContextParallelShard


def context_parallel_ssd(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, document_start: Tensor | None, shards: ContextParallelShard
) -> Tensor:
    """The recurrence from the beginning of the sequences.

    Args:
        x, log_a, b, c: [s / cp, b, ...] as :func:`megaforge.kernels.ssd.ssd`, the tokens of this rank.
        document_start: bool [s / cp, b]; None: no document starts after the sequence does.
        shards: which chunks they are.

    Returns:
        y [s / cp, b, H, P] in the dtype of ``x``.
    """
    if shards.axis.size == 1:
        return ssd(x, log_a, b, c, None, document_start)[0]
    count = len(shards.chunks)
    starts = [None] * count if document_start is None else document_start.chunk(count)
    pieces = zip(*(each.chunk(count) for each in (x, log_a, b, c)), starts, strict=True)
    parts = [chunks_of(*piece) for piece in pieces]
    # One tensor, one exchange: Q [b, H, P * N] and k in its last column.
    own = [torch.cat([part.states(None)[1].flatten(-2), part.keep.prod(0)[..., None]], -1) for part in parts]
    every = shards.gather(torch.stack(own))
    states = [torch.zeros_like(parts[0].added[0])]
    for summary in every[:-1]:
        added, keep = summary[..., :-1].view_as(states[0]), summary[..., -1][..., None, None]
        states.append(keep * states[-1] + added)
    outs = [part.output(part.states(states[number])[0]) for number, part in zip(shards.chunks, parts, strict=True)]
    return torch.cat(outs)
