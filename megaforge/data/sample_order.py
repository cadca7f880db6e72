"""The order in which training reads one source: documents shuffled each epoch, cut by a token cursor.

Epoch after epoch, a source's documents are laid end to end in a fresh order; a window is any range of that endless
token stream. All epochs have the same number of tokens, so a cursor finds its epoch by one division and its document
by one binary search: nothing is built for the length of a run. Windows of any length continue from a cursor, so a later
stage with longer sequences goes on where the shorter ones stopped.

The order of an epoch is a pure function of (seed, source content, epoch): documents sorted by SplitMix64 of a keyed
counter (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). It is written out here
because NumPy keeps the right to change what its generators' ``permutation`` returns.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.data.sidecar import digest_of

_native: Any
try:
    _native = importlib.import_module("megaforge.data._data_helpers")  # built from csrc/data_helpers
except ImportError:
    _native = None  # the NumPy form below reads the same windows, many short documents several times slower

ORDER_VERSION = 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_EPOCHS_HELD = 2  # the one being read and the one a window runs over into
_LOOP_DOCUMENTS = 16  # up to so many documents a window, a loop of slices beats one vectorised gather


def has_native_copy() -> bool:
    """Whether the C++ helper is there."""
    return _native is not None


def key_of(*parts: object) -> int:
    """A 64-bit key from JSON-like parts."""
    return int(digest_of(list(parts))[:16], 16)


def splitmix64(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output for each counter, from the state ``key``; distinct counters give distinct values."""
    z = np.uint64(key) + (counters + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(key: int, items: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """The permutation that sorts ``items`` (distinct, >= 0) by their keyed hash: int64 [len(items)]."""
    # No two hashes are equal (SplitMix64 is a bijection of the counter), so any sorting algorithm gives one result.
    return np.argsort(splitmix64(key, items.astype(np.uint64)))


def round_order(key: list[object], documents: int) -> npt.NDArray[np.intp]:
    """The order of a round's documents: int64 [documents]."""
    return shuffled(key_of(ORDER_VERSION, "round", *key), np.arange(documents))


class EpochOrder:
    """One epoch's documents in reading order: where each begins in the stream and in the token file.

    Args:
        table: int64 [2, documents + 1]; row 0 the running token count from 0, row 1 each document's first token in the
            file (its last entry is unused).
    """

    def __init__(self, table: npt.NDArray[np.int64]) -> None:
        self.bounds, self.starts = table[0], table[1]
        # Scalar reads through a memoryview give plain ints in half the time of an array's.
        self._bounds_view, self._starts_view = memoryview(self.bounds), memoryview(self.starts)
        self._documents = len(self.bounds) - 1

    def copy(
        self, tokens: np.ndarray, offset: int, out: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_], filled: int
    ) -> int:
        """Copies the epoch's tokens from ``offset`` on into ``out[filled:]`` until either ends.

        ``marks`` (as long as ``out``) is set to True where a document's first token lands. Returns the new ``filled``.
        """
        if _native is not None:
            return int(_native.copy(tokens, self.bounds, self.starts, offset, out, marks, filled))
        bounds, starts, documents = self._bounds_view, self._starts_view, self._documents
        document = int(self.bounds.searchsorted(offset, "right")) - 1
        length = len(out)
        horizon = bounds[min(document + _LOOP_DOCUMENTS, documents)]
        if horizon - offset < length - filled and document + _LOOP_DOCUMENTS < documents:
            return self._gather(tokens, offset, out, marks, filled, document)
        begin = bounds[document]
        while filled < length and document < documents:
            end = bounds[document + 1]
            stop = min(filled + end - offset, length)
            source = starts[document] + offset - begin
            out[filled:stop] = tokens[source : source + stop - filled]
            if offset == begin:
                marks[filled] = True
            filled = stop
            offset = begin = end
            document += 1
        return filled

    def _gather(
        self,
        tokens: np.ndarray,
        offset: int,
        out: npt.NDArray[np.int64],
        marks: npt.NDArray[np.bool_],
        filled: int,
        first: int,
    ) -> int:
        """As :meth:`copy`, in one indexed read, for windows over many short documents."""
        stop = min(offset + len(out) - filled, int(self.bounds[-1]))
        last = int(self.bounds.searchsorted(stop, "left"))
        edges = self.bounds[first : last + 1].copy()
        shift = self.starts[first:last] - edges[:-1]
        begun = int(edges[0] < offset)  # the first document began in an earlier window
        edges[0], edges[-1] = offset, stop
        places = np.arange(offset, stop)
        places += np.repeat(shift, edges[1:] - edges[:-1])
        end = filled + stop - offset
        out[filled:end] = tokens.take(places)
        marks[filled:end][edges[begun:-1] - offset] = True
        return end


def documents_in_order(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> EpochOrder:
    """Documents, int64 [documents] each, read once in the order given."""
    full = np.flatnonzero(lengths)
    table = np.zeros((2, len(full) + 1), np.int64)
    np.cumsum(lengths[full], out=table[0, 1:])
    table[1, :-1] = starts[full]
    return EpochOrder(table)


class JoinedTokens:
    """Documents one after the other as one array of tokens that is read where it is sliced: int64 [n].

    Args:
        tokens: integer [any], the token file.
        starts, lengths: int64 [documents], where each document lies in it.
    """

    def __init__(self, tokens: np.ndarray, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        self._tokens, self._order = tokens, documents_in_order(starts, lengths)
        self.document_starts = self._order.bounds[:-1]

    def __len__(self) -> int:
        return int(self._order.bounds[-1])

    def __getitem__(self, part: slice) -> npt.NDArray[np.int64]:
        start, stop, _ = part.indices(len(self))
        out = np.empty(max(stop - start, 0), np.int64)
        self._order.copy(self._tokens, start, out, np.zeros(len(out), np.bool_), 0)
        return out


class TokenStream:
    """A source's endless token stream: its documents, epoch after epoch, each epoch in its own order.

    Args:
        tokens: integer [any], the source's token file.
        starts, lengths: int64 [documents], where each document of the split lies in ``tokens``.
        numbers: int64 [documents], each document's number in the file; the numbers and ``key`` decide the order.
        key: JSON-like identity of the source and seed.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
        key: list[object],
    ) -> None:
        self._tokens = tokens
        if not lengths.all():  # an empty document would only lengthen the search
            full = np.flatnonzero(lengths)
            starts, lengths, numbers = starts[full], lengths[full], numbers[full]
        self._starts, self._lengths, self._numbers = starts, lengths, numbers
        self.num_tokens = int(lengths.sum())
        self._key = [ORDER_VERSION, *key]
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._lock = threading.Lock()

    def copy(self, cursor: int, out: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        """Fills ``out`` int64 [length] with the tokens from ``cursor`` on; sets ``marks`` at document starts."""
        epoch, offset = divmod(cursor, self.num_tokens)
        filled, length = 0, len(out)
        while filled < length:
            order = self._orders.get(epoch) or self.order(epoch)
            filled = order.copy(self._tokens, offset, out, marks, filled)
            epoch, offset = epoch + 1, 0

    def order(self, epoch: int) -> EpochOrder:
        """The order of one epoch; the least recently built of more than two is dropped."""
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                order = EpochOrder(self._build(epoch))
                self._orders[epoch] = order
                while len(self._orders) > _EPOCHS_HELD:
                    self._orders.popitem(last=False)
        return order

    def _build(self, epoch: int) -> npt.NDArray[np.int64]:
        return self._table(shuffled(key_of(*self._key, epoch), self._numbers))

    def _table(self, permutation: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What :class:`EpochOrder` takes, of the documents in this order."""
        table = np.zeros((2, len(permutation) + 1), np.int64)
        np.cumsum(self._lengths[permutation], out=table[0, 1:])
        table[1, :-1] = self._starts[permutation]
        return table


class RoundStream(TokenStream):
    """A source's endless token stream in the order in which :mod:`megaforge.data.stream` reads text: documents in file
    order, shuffled within rounds of ``size``."""

    def __init__(
        self,
        tokens: np.ndarray,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
        key: list[object],
        size: int,
    ) -> None:
        super().__init__(tokens, starts, lengths, numbers, key)
        self._round_key, self._size = key, size

    def _build(self, epoch: int) -> npt.NDArray[np.int64]:
        rounds, within = np.divmod(self._numbers, self._size)
        edges = [0, *(np.flatnonzero(np.diff(rounds)) + 1).tolist(), len(rounds)]
        permutation = np.empty(len(rounds), np.int64)
        for first, stop in zip(edges, edges[1:], strict=False):
            order = round_order([*self._round_key, epoch, int(rounds[first])], self._size)
            place = np.empty(self._size, np.int64)
            place[order] = np.arange(self._size)
            permutation[first:stop] = first + np.argsort(place[within[first:stop]])
        return self._table(permutation)
