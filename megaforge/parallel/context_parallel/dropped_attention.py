"""Attention with dropped probabilities, over sequences that ranks of cp may share."""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.attention import native_dropped
from megaforge.kernels.attention.dropped import Places, dropped_attention
from megaforge.parallel.dropout import kept, scale_of, threshold_of
from megaforge.parallel.packed_sequence import PackedSequence


def dropped_attention_of(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, info: PackedSequence) -> Tensor:
    """Causal attention, within documents, of this rank's tokens to all tokens of the sequence; keys and values of the
    ranks of cp are gathered, however ``--cp-comm-type`` passes them without dropout.

    Args:
        query: [b, heads, s / cp, d].
        key, value: [b, groups, s / cp, d].
        rows: int64 [b, heads, s / cp], from :meth:`megaforge.parallel.dropout.Dropout.attention_rows`.
        info: the micro-batch, with its dropout.

    Returns:
        [b, heads, s / cp, d].
    """
    assert info.dropout is not None
    rate, shards = info.dropout.rates.attention, info.shards
    if shards.axis.size > 1:
        local = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)  # the gather is along dim 0
        key, value = shards.gather(local).permute(1, 2, 0, 3).chunk(2, dim=-1)
    size = query.shape[2] // len(shards.chunks)
    if native_dropped.takes(query):
        out = []
        parts = zip(shards.chunks, query.chunk(len(shards.chunks), 2), rows.chunk(len(shards.chunks), 2), strict=True)
        for number, part, seeds in parts:
            end = (number + 1) * size
            seen = info.segments(range(number * size, end), range(end))
            given = part, key[:, :, :end], value[:, :, :end], seen, seeds, threshold_of(rate)
            out.append(native_dropped.dropped_attention(*given))
        return torch.cat(out, dim=2)
    documents = (info.document_ids_BS, info.all_document_ids_BS) if info.has_boundaries else (None, None)
    places = Places(tuple(number * size for number in shards.chunks), *documents)

    def stays(first: int, end: int, last: int) -> Tensor:
        return kept(rows[:, :, first:end], rate, last)

    return dropped_attention(query, key, value, places, stays, scale_of(rate))
