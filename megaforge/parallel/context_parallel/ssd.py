"""Mamba-2's recurrence over sequences that the ranks of cp share: every chunk starts from the state that all chunks
before it leave.

A chunk takes the state S before it to ``k S + Q``, with a number k a head. Only k and Q are exchanged, and every rank
combines them in the order of the chunks; the backward pass is that of these steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.ssd import SSD, ssd_chunked
from megaforge.parallel.context_parallel.shard import ContextParallelShard


def context_parallel_ssd(
    x: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    document_start: Tensor | None,
    shards: ContextParallelShard,
    function: SSD = ssd_chunked,
) -> Tensor:
    """The recurrence from the beginning of the sequences.

    Args:
        x, step, b, c: [s / cp, b, ...] as :func:`megaforge.kernels.ssd.ssd`, the tokens of this rank; a, skip: too.
        document_start: bool [s / cp, b]; None: no document starts after the sequence does.
        shards: which chunks they are.
        function: the implementation of the recurrence on each.

    Returns:
        y [s / cp, b, H, P] in the dtype of ``x``.
    """
    if shards.axis.size == 1:
        return function(x, step, a, b, c, skip, document_start).output(None)[0]
    count = len(shards.chunks)
    starts = [None] * count if document_start is None else document_start.chunk(count)
    cut = zip(*(each.chunk(count) for each in (x, step, b, c)), starts, strict=True)
    pieces = [function(x, step, a, b, c, skip, start) for x, step, b, c, start in cut]
    # One tensor, one exchange: Q [b, H, P * N] and k in its last column.
    summaries = [piece.summary() for piece in pieces]
    every = shards.gather(torch.stack([torch.cat([q.flatten(-2), k[..., None]], -1) for k, q in summaries]))
    states = [torch.zeros_like(summaries[0][1])]
    for summary in every[:-1]:
        added, keep = summary[..., :-1].view_as(states[0]), summary[..., -1][..., None, None]
        states.append(keep * states[-1] + added)
    return torch.cat([piece.output(states[at])[0] for at, piece in zip(shards.chunks, pieces, strict=True)])
