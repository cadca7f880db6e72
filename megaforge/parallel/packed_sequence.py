"""Where the documents of a packed micro-batch begin: made once a micro-batch, read by every layer."""

from __future__ import annotations

import copy
from typing import Any

import torch

from megaforge.device import upload
from megaforge.kernels.attention import taken_mask
from megaforge.kernels.attention.segments import documents_of, segments_of
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.dropout import Dropout


class PackedSequence:
    """Document boundaries and positions of ``batch`` sequences of ``length`` tokens. Treat it as read-only.

    Under context parallelism it is made from whole sequences, and describes the s = length / cp tokens of each that
    this rank holds: positions and documents count from the beginning of the whole.

    Attributes:
        document_start_SB: bool [s, b], true where a token sees nothing before it. Position 0 of a fresh sequence
            always does.
        position_ids_BS: int64 [b, s], position within the token's document.
        document_ids_BS: int64 [b, s], 0, 1, ... within each sequence.
        has_boundaries: whether any document starts after position 0, on whichever rank (a Python bool: layers branch
            on it for free, and all ranks of cp alike).
        shards: the part of the sequences that this rank holds.
        offset: tokens of these sequences that a recurrent state has already consumed, of the longest of them.
        padding_B: int64 [b], how much shorter than that each sequence is; None: not at all.
        dropout: the masks of a micro-batch that is trained on; None: nothing is dropped.
        place: int64 [1] on the device, unknown to the host: the place of the one token of each sequence in a step that
            is recorded once for all places; None: see ``offset``.
        used_BS: bool [b, s] of the whole sequences, which tokens are no padding; None: all.
        cache: what layers derive from the above for later layers too (rotary tables).
    """

    place: torch.Tensor | None = None
    used_BS: torch.Tensor | None = None

    def __init__(
        self,
        batch: int,
        length: int,
        device: torch.device,
        document_start_BS: torch.Tensor | None = None,
        offset: int = 0,
        shards: ContextParallelShard | None = None,
        padding_B: torch.Tensor | None = None,
    ) -> None:
        """Builds the description.

        Args:
            batch: sequences.
            length: tokens of each whole sequence.
            device: where the tensors live.
            document_start_BS: bool [b, s]; None when no document starts after position 0. In host memory where
                ``device`` is a GPU: whether there are boundaries is asked here, and nobody should wait for the answer.
            offset: tokens already consumed by a recurrent state: the sequences continue, so position 0 starts nothing
                and positions count on from here.
            shards: what this rank holds of a sequence that the ranks of cp share; None: all of it.
            padding_B: int64 [b], how many of the ``offset`` places each sequence has not used: it began after them.

        Raises:
            ValueError: boundaries of another shape, or together with an offset; sequences that are shared by ranks
                continue from a state, or do not divide into chunks.
        """
        if document_start_BS is not None and document_start_BS.shape != (batch, length):
            raise ValueError(f"document_start has shape {tuple(document_start_BS.shape)}, expected {(batch, length)}")
        if document_start_BS is not None and offset:
            raise ValueError("a sequence that continues from a state cannot hold document boundaries")
        self.shards = ContextParallelShard() if shards is None else shards
        if offset and self.shards.axis.size > 1:
            raise ValueError("a sequence that continues from a state cannot be shared by the ranks of cp")
        self.offset = offset
        self.padding_B = padding_B
        self.has_boundaries = document_start_BS is not None and bool(document_start_BS[:, 1:].any())
        positions = torch.arange(offset, offset + length, device=device)
        start = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if self.has_boundaries and document_start_BS is not None:
            start |= upload(document_start_BS.to(torch.bool), device)
        if offset == 0:
            start[:, 0] = True
        if self.has_boundaries:
            begun = torch.where(start, positions, 0).cummax(dim=1).values
            position_ids_BS, self._documents_BS = positions - begun, start.long().cumsum(dim=1) - 1
        else:
            position_ids_BS = positions.expand(batch, length)
            if padding_B is not None:
                position_ids_BS = position_ids_BS - padding_B[:, None]
            self._documents_BS = torch.zeros(1, 1, dtype=torch.long, device=device).expand(batch, length)
        self._places_S = self.local(positions - offset, dim=0)
        self._positions_BS = position_ids_BS
        self.position_ids_BS = self.local(position_ids_BS)
        self.document_ids_BS = self.local(self._documents_BS)
        self.document_start_SB = self.local(start).t().contiguous()
        self.cache: dict[Any, Any] = {}
        self.dropout: Dropout | None = None
        self._start_BS = document_start_BS
        self._mask: torch.Tensor | None = None

    @classmethod
    def at(cls, place: torch.Tensor, padding_B: torch.Tensor) -> PackedSequence:
        """One token of each sequence, at a ``place`` int64 [1] that the device alone knows, of which the first
        ``padding_B`` int64 [b] are not used."""
        info = cls(len(padding_B), 1, place.device, offset=1, padding_B=padding_B)
        info.place, info.position_ids_BS = place, (place - padding_B)[:, None]
        return info

    def places_mask(self, places: int, dtype: torch.dtype) -> torch.Tensor:
        """What a token at ``place`` sees of the ``places`` of a cache, as ``step_attention`` takes it for scores of
        ``dtype``: [b, 1, 1, places], made once."""
        if ("places_mask", places, dtype) not in self.cache:
            assert self.place is not None and self.padding_B is not None
            each = torch.arange(places, device=self.place.device)
            seen = (each <= self.place) & (each >= self.padding_B[:, None])
            self.cache["places_mask", places, dtype] = taken_mask(seen[:, None, None], dtype)
        mask: torch.Tensor = self.cache["places_mask", places, dtype]
        return mask

    @property
    def batch(self) -> int:
        return self.document_start_SB.shape[1]

    @property
    def positions_S(self) -> torch.Tensor:
        """int64 [s], where in the whole sequence each of this rank's tokens is, documents notwithstanding."""
        return self._places_S

    @property
    def length(self) -> int:
        return self.document_start_SB.shape[0]

    @property
    def all_document_ids_BS(self) -> torch.Tensor:
        """As ``document_ids_BS``, of the whole sequences, wherever their tokens are."""
        return self._documents_BS

    @property
    def all_position_ids_BS(self) -> torch.Tensor:
        """As ``position_ids_BS``, of the whole sequences, wherever their tokens are."""
        return self._positions_BS

    def select(self, indices_SB: torch.Tensor) -> PackedSequence:
        """Some tokens of each sequence, for a layer that sees no others: documents begin with their first chosen token,
        and positions stay what they are. Ranks that share whole sequences share the chosen tokens likewise.

        Args:
            indices_SB: int64 [k, b], places in each whole sequence in ascending order. What is behind the last place
                in order belongs to documents of its own.

        Raises:
            ValueError: the sequences continue from a state, or the tokens do not divide into chunks.
        """
        if self.offset:
            raise ValueError("tokens are selected from whole sequences, from their beginning")
        places_BS, some = indices_SB.t(), copy.copy(self)
        some._positions_BS = self._positions_BS.gather(1, places_BS)
        of, change = self._documents_BS.gather(1, places_BS), torch.ones_like(places_BS, dtype=torch.bool)
        change[:, 1:] = (of[:, 1:] != of[:, :-1]) | (places_BS[:, 1:] < places_BS[:, :-1])
        some._documents_BS = change.long().cumsum(1) - 1
        some.position_ids_BS, some.document_ids_BS = self.local(some._positions_BS), self.local(some._documents_BS)
        some.document_start_SB = self.local(change).t().contiguous()
        some._places_S = self.local(torch.arange(len(indices_SB), device=indices_SB.device), dim=0)
        some.dropout = None if self.dropout is None else self.dropout.select(indices_SB, self.shards)
        some.used_BS = None if self.used_BS is None else self.used_BS.gather(1, places_BS)
        some.cache, some._start_BS, some._mask = {}, None, None
        return some

    def local(self, x_BS: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's tokens of ``x_BS``, which is whole along ``dim``."""
        return self.shards.take(x_BS, dim)

    def attention_mask(self) -> torch.Tensor | None:
        """Bool [b or 1, 1, s, length], true where query (dim 2, this rank's tokens) may see key (dim 3, the whole
        sequence): causal and within one document.

        None when plain causal attention is the same; made at the first call and kept for the other layers. For mixers
        that take a mask; attention takes :meth:`segments`.
        """
        if not self.has_boundaries and self.shards.axis.size == 1:
            return None
        if self._mask is None:
            places = torch.arange(self._documents_BS.shape[1], device=self.positions_S.device)
            mask = (self.positions_S[:, None] >= places)[None]
            if self.has_boundaries:
                mask = mask & (self.document_ids_BS[:, :, None] == self._documents_BS[:, None, :])
            self._mask = mask[:, None]
        return self._mask

    def segments(self, queries: range, keys: range) -> torch.Tensor:
        """What queries at some places of the whole sequences see of keys at some places, for attention that takes
        segments (:mod:`megaforge.kernels.attention.segments`): int64 [n, 6] in host memory, made once; nobody waits for
        a device, but for :meth:`select`'s documents and for padding."""
        if "documents" not in self.cache:
            ids = self._documents_BS
            if not self.has_boundaries:
                ids = torch.zeros(1, 1, dtype=torch.long).expand(ids.shape)
            elif self._start_BS is not None:
                ids = self._start_BS.cpu().long().cumsum(1)
            self.cache["documents"] = documents_of(ids, self.offset, self.padding_B)
        if ("segments", queries, keys) not in self.cache:
            self.cache["segments", queries, keys] = segments_of(self.cache["documents"], queries, keys)
        found: torch.Tensor = self.cache["segments", queries, keys]
        return found
