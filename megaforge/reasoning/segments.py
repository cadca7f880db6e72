"""The steps in which fast weights change: each document in stretches of ``size`` tokens, the last one open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.parallel.packed_sequence import PackedSequence


@dataclass(frozen=True)
class Segments:
    """K segments of each of b sequences, of up to C tokens each.

    Attributes:
        places_SB: int64 [s, b], where each of this cp rank's tokens is among the b x K x C places.
        number: K, of the sequence that has most.
        size: C.
        tokens_BK: int64 [b, K], how many tokens each has, on all ranks of cp.
        fresh_BK: bool [b, K], whether it begins a document.
        last_B: int64 [b], each sequence's last one.
        open_B: int64 [b], which stretch of its document that is.
        counts_SB: bool [s, b], which of this cp rank's tokens are no padding.
        parted: whether a document begins within a sequence.
        in_order: whether places are those of tokens one after the other, from each sequence's first on.
    """

    places_SB: Tensor
    number: int
    size: int
    tokens_BK: Tensor
    fresh_BK: Tensor
    last_B: Tensor
    open_B: Tensor
    counts_SB: Tensor
    parted: bool = True
    in_order: bool = False

    def spread(self, x: Tensor, places: Tensor) -> Tensor:
        """[s, b, d] of the tokens at ``places`` [s, b] -> [b, K, C, d], zero where there is none of them."""
        batch, number = self.tokens_BK.shape
        if self.in_order and places is self.places_SB:  # nothing moves
            whole = x.transpose(0, 1)
            if (rest := number * self.size - len(x)) > 0:
                whole = F.pad(whole, (0, 0, 0, rest))
            return whole.reshape(batch, number, self.size, -1)
        flat = x.new_zeros(batch * number * self.size, x.shape[-1])
        return flat.index_copy(0, places.flatten(), x.flatten(0, 1)).view(batch, number, self.size, -1)

    def gather(self, x: Tensor, places: Tensor) -> Tensor:
        """The opposite."""
        if self.in_order and places is self.places_SB:
            return x.flatten(1, 2)[:, : len(places)].transpose(0, 1)
        return x.flatten(0, 2).index_select(0, places.flatten()).view(*places.shape, -1)


def segments_of(info: PackedSequence, size: int, open_B: Tensor | None = None) -> Segments:
    """Those of a micro-batch.

    Args:
        size: tokens of a full one.
        open_B: int64 [b], the stretch of its document that each sequence is in, which go on; it is segment 0, of no
            token here where the next one begins. None: the sequences begin here.
    """
    positions, documents = info.all_position_ids_BS, info.all_document_ids_BS
    stretch = positions.div(size, rounding_mode="floor")
    change, begins = torch.zeros_like(positions, dtype=torch.bool), torch.zeros_like(positions, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    change[:, 1:] = begins[:, 1:] | (stretch[:, 1:] != stretch[:, :-1])
    if open_B is None:
        begins[:, 0] = True
    else:
        change[:, 0] = stretch[:, 0] != open_B
    segment = change.long().cumsum(1)
    # A plan has no data: its sequences are one document each.
    if positions.is_meta:
        number, parted, in_order = -(-positions.shape[1] // size), False, False
    else:
        plain = (positions == torch.arange(positions.shape[1], device=positions.device)).all()
        last, parts, counted = torch.stack([segment.max(), begins[:, 1:].any().long(), plain.long()]).tolist()
        number, parted = last + 1, bool(parts)
        in_order = bool(counted) and not parted and open_B is None and info.shards.axis.size == 1
    counts = positions.new_zeros(len(positions), number)
    tokens = counts.scatter_add(1, segment, torch.ones_like(segment))
    fresh = counts.scatter_add(1, segment, begins.long()) > 0
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    places = (rows * number + segment) * size + positions.remainder(size)
    own = info.local(places).t().contiguous()
    counts = torch.ones_like(own, dtype=torch.bool) if info.used_BS is None else info.local(info.used_BS).t()
    return Segments(own, number, size, tokens, fresh, segment[:, -1], stretch[:, -1], counts, parted, in_order)
