"""Softmax attention over sequences that the ranks of cp share."""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.attention import causal_attention
from megaforge.kernels.attention.largest_logits import largest_logits
from megaforge.parallel.context_parallel.ring_attention import ring_attention
from megaforge.parallel.context_parallel.shard import ring
from megaforge.parallel.packed_sequence import PackedSequence


def context_parallel_attention(query: Tensor, key: Tensor, value: Tensor, info: PackedSequence) -> Tensor:
    """Causal attention, within documents, of this rank's tokens to all tokens of the sequence.

    With ``--cp-comm-type allgather`` keys and values of all ranks of cp are gathered (their gradients are summed and
    scattered back), in one collective each way; a chunk of queries is given the keys up to its own end only, so that
    all ranks compute the same amount. With p2p keys and values travel in a ring, and no tensor grows faster than the
    rank's part of the sequence.

    Args:
        query: [b, heads, s / cp, d].
        key, value: [b, groups, s / cp, d].
        info: the micro-batch.

    Returns:
        [b, heads, s / cp, d].
    """
    if info.shards.comm_type == "p2p":
        return ring_attention(query, key, value, info.segments, info.shards)
    # [s / cp, b, groups, 2d]: the gather is along dim 0
    local = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)
    key, value = info.shards.gather(local).permute(1, 2, 0, 3).chunk(2, dim=-1)
    chunks = info.shards.chunks
    size, out = query.shape[2] // len(chunks), []
    for number, rows in zip(chunks, query.chunk(len(chunks), 2), strict=True):
        seen = info.segments(range(number * size, (number + 1) * size), range((number + 1) * size))
        end = (number + 1) * size
        out.append(causal_attention(rows, key[:, :, :end], value[:, :, :end], seen))
    return torch.cat(out, dim=2)


@torch.no_grad()
def largest_visible_logits(query: Tensor, key: Tensor, info: PackedSequence) -> Tensor:
    """The largest logit of each head over this rank's queries and all tokens that they see, whose keys pass in a ring:
    arguments as above -> [heads]; see :func:`megaforge.kernels.attention.largest_logits.largest_logits`."""
    shards, documents = info.shards, info.all_document_ids_BS if info.has_boundaries else None
    count, found = len(shards.chunks), list[Tensor]()
    size = query.shape[2] // count
    for owner, keys in ring(key, shards.axis):
        for number, rows in zip(shards.chunks, query.chunk(count, 2), strict=True):
            for seen, block in zip(shards.chunks_of(owner), keys.chunk(count, 2), strict=True):
                if seen <= number:
                    both = (number, seen)
                    own = None if documents is None else [documents[:, n * size : (n + 1) * size] for n in both]
                    pair = None if own is None else (own[0], own[1])
                    found.append(largest_logits(rows, block, (number - seen) * size, pair))
    return torch.stack(found).amax(0)
