"""Words and lines of a batch of texts and their hashes, all at once: what filters, near-duplicates and decontamination
look at.

A hash is of the bytes alone, eight at a time, each step a bijection of 64 bits (the finaliser of SplitMix64, Steele
et al. 2014): equal spans have equal hashes wherever they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.data.corpus.columns import flat_bytes, one_array, with_rows
from megaforge.data.corpus.native import corpus_text

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LONGEST = 256  # bytes of a span that is hashed in steps of eight; a longer one in pieces
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # the first bytes of a little-endian number
# Quotation marks, dashes, ellipses, ideographic and full-width punctuation separate words as ASCII's do.
_PUNCTUATION = "[\u00ab\u00bb\u00b7\u2000-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]+"
_WORD = np.zeros(256, bool)
_WORD[128:] = True
_WORD[[*b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"]] = True


def mix(numbers: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit."""
    mixed = numbers ^ (numbers >> np.uint64(30))
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_spans(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The hash of each ``data[start:end]`` [spans] uint64."""
    native = corpus_text()
    if native is not None:
        hashes: np.ndarray = native.hash_spans(data, starts, ends)
        return hashes
    size = ends - starts
    hashes = _hashes_of_short(data, starts, size)
    long = np.flatnonzero(size > _LONGEST)
    if len(long):
        hashes[long] = _hashes_of_long(data, starts[long], size[long])
    return hashes


def _hashes_of_long(data: np.ndarray, starts: np.ndarray, size: np.ndarray) -> np.ndarray:
    """From the hashes of their pieces of 256 bytes."""
    pieces = -(-size // _LONGEST)
    first = np.concatenate([[0], np.cumsum(pieces)])
    number = np.arange(first[-1]) - np.repeat(first[:-1], pieces)
    rest = np.minimum(np.repeat(size, pieces) - number * _LONGEST, _LONGEST)
    piece = _hashes_of_short(data, np.repeat(starts, pieces) + number * _LONGEST, rest)
    hashes = size.astype(np.uint64)
    for one in range(int(pieces.max())):
        left = np.flatnonzero(pieces > one)
        hashes[left] = _step(hashes[left], piece[first[left] + one])
    return hashes


def _hashes_of_short(data: np.ndarray, starts: np.ndarray, size: np.ndarray) -> np.ndarray:
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    eights: np.ndarray = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))
    hashes = _step(size.astype(np.uint64), eights[starts] & _MASKS[np.minimum(size, 8)])
    left = np.flatnonzero((size > 8) & (size <= _LONGEST))
    done = 8
    while len(left):
        part = np.minimum(size[left] - done, 8)
        hashes[left] = _step(hashes[left], eights[starts[left] + done] & _MASKS[part])
        done += 8
        left = left[size[left] > done]
    return hashes


def _step(hashes: np.ndarray, eight: np.ndarray) -> np.ndarray:
    return mix((hashes * _FACTOR) ^ eight)


class HashSet:
    """Finds which of many hashes are in a set of few. A table by their last bits rules out most."""

    def __init__(self, hashes: np.ndarray) -> None:
        """
        Args:
            hashes: ascending [members] uint64.
        """
        self.hashes = hashes
        bits = min(max(len(hashes).bit_length() + 6, 12), 26)
        self._mask = np.uint64((1 << bits) - 1)
        self._maybe = np.zeros(1 << bits, bool)
        self._maybe[(hashes & self._mask).astype(np.int64)] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of ``hashes`` are in the set, ascending [hits] int64, and which member each is [hits] int64."""
        if not len(self.hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        maybe = np.flatnonzero(self._maybe[(hashes & self._mask).astype(np.int64)])
        place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        same = self.hashes[place] == hashes[maybe]
        return maybe[same], place[same]


@dataclass(frozen=True)
class Words:
    """The words of a batch, in order.

    Attributes:
        first: the first word of each row, and the number of all [rows + 1] int64.
        row: the row of each word [words] int64.
        start, end: its bytes, counted over the batch [words] int64.
        hash: [words] uint64.
    """

    first: np.ndarray
    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    hash: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Words of each row [rows] int64."""
        return np.diff(self.first)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows [grams] int64 and hashes [grams] uint64 of all runs of ``n`` words within a row, in order."""
        last = len(self.hash) - n + 1
        if last <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64)
        whole = self.row[:last] == self.row[n - 1 :]
        grams = np.zeros(last, np.uint64)
        for word in range(n):
            grams *= _FACTOR
            grams += self.hash[word : word + last]
        return self.row[:last][whole], mix(grams[whole])


def words_of(data: np.ndarray, offsets: np.ndarray) -> Words:
    """The words of the rows of :func:`megaforge.data.corpus.columns.flat_bytes`: runs of letters, digits, ``_`` and
    bytes beyond ASCII."""
    native = corpus_text()
    first, start, end = native.words(data, offsets) if native is not None else _split(data, offsets)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(first))
    return Words(first, row, start, end, hash_spans(data, start, end))


def _split(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first word of each row and the number of all, where each begins and where it ends."""
    inside = np.zeros(len(data) + 2, bool)
    inside[1:-1] = _WORD[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1])  # a word begins, it ends, the next begins ...
    start, end = edges[::2], edges[1::2]
    # Where a row begins amid a word, one word ends and another begins.
    begins = np.unique(offsets[1:-1])
    cuts = begins[(begins > 0) & (begins < len(data))]
    cuts = cuts[inside[cuts] & inside[cuts + 1]]
    if len(cuts):
        start, end = np.sort(np.concatenate([start, cuts])), np.sort(np.concatenate([end, cuts]))
    return np.searchsorted(start, offsets).astype(np.int64), start, end


def lines_of(data: np.ndarray, offsets: np.ndarray, feeds: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lines that are not empty: the first of each row and the number of all [rows + 1] int64, where each begins and
    where it ends [lines] int64. With two ``feeds`` it is paragraphs: what blank lines separate."""
    native = corpus_text()
    if native is not None:
        first, starts, ends = native.lines(data, offsets, feeds)
        return first, starts, ends
    feed = data == ord("\n")
    if feeds == 2:
        feed[1:] &= feed[:-1].copy()
        feed[offsets[:-1][offsets[:-1] < len(data)]] = False  # a pair lies within its row
    cut = np.flatnonzero(feed)
    starts = np.sort(np.concatenate([offsets[:-1], cut + 1]))
    ends = np.maximum(starts, np.sort(np.concatenate([offsets[1:], cut + 1 - feeds])))
    full = ends > starts
    return np.searchsorted(starts[full], offsets).astype(np.int64), starts[full], ends[full]


def plain_words(column: Any) -> Words:
    """The words of the texts in lower case, with Unicode's punctuation as separators: two texts that differ in case,
    punctuation and spacing alone have the same hashes in the same order."""
    return words_of(*flat_bytes(plain(column)))


def plain(column: Any) -> Any:
    """The texts as :func:`plain_words` takes them."""
    lower = pc.utf8_lower(one_array(column))
    rows = ~np.asarray(pc.string_is_ascii(lower).to_numpy(zero_copy_only=False), bool)
    if not rows.any():
        return lower
    spaced = pc.replace_substring_regex(lower.filter(pa.array(rows)), _PUNCTUATION, " ")
    return with_rows(lower, rows, spaced)
