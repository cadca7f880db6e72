"""Words of a batch of texts and their hashes, all at once: what filters, near-duplicates and decontamination look at.

A hash of a span of bytes is a polynomial over random 64-bit numbers, one for each byte value, taken modulo 2^64 from
running sums (Karp and Rabin 1987), then mixed (the finaliser of SplitMix64, Steele et al. 2014). Equal spans have equal
hashes wherever they stand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from megaforge.data.corpus.columns import flat_bytes, one_array

_BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_TABLE = np.random.Generator(np.random.PCG64(1)).integers(0, 1 << 64, 256, np.uint64, endpoint=False)
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


class SpanHashes:
    """Hashes of any spans of one array of bytes."""

    def __init__(self, data: np.ndarray) -> None:
        self._sums = np.zeros(len(data) + 1, np.uint64)
        np.cumsum(_TABLE[data] * _powers(_BASE, len(data)), out=self._sums[1:])
        self._back = _powers(_INVERSE, len(data) + 1)

    def __call__(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The hash of each ``data[start:end]`` [spans] uint64."""
        length = (ends - starts).astype(np.uint64)
        return mix((self._sums[ends] - self._sums[starts]) * self._back[starts] + length)


@functools.lru_cache(maxsize=2)
def _table_of_powers(base: int, length: int) -> np.ndarray:
    powers = np.full(length, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _powers(base: int, length: int) -> np.ndarray:
    """``base`` to the powers 0 to ``length - 1``, modulo 2^64."""
    return _table_of_powers(base, 1 << max(length, 1 << 16).bit_length())[:length]


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
            grams *= np.uint64(_BASE)
            grams += self.hash[word : word + last]
        return self.row[:last][whole], mix(grams[whole])


def words_of(data: np.ndarray, offsets: np.ndarray) -> Words:
    """The words of the rows of :func:`megaforge.data.corpus.columns.flat_bytes`: runs of letters, digits, ``_`` and
    bytes beyond ASCII."""
    inside = _WORD[data]
    before = np.zeros(len(data) + 1, bool)
    before[1:] = inside
    begins = offsets[:-1][np.diff(offsets) > 0]
    before[begins] = False
    start = np.flatnonzero(inside & ~before[:-1])
    after = np.zeros(len(data) + 1, bool)
    after[:-1] = inside
    after[offsets[1:]] = False
    # A word ends before a separator, or where its row ends.
    closes = np.zeros(len(data), bool)
    closes[:] = inside & ~after[1:]
    end = np.flatnonzero(closes) + 1
    first = np.searchsorted(start, offsets).astype(np.int64)
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(first))
    return Words(first, row, start, end, SpanHashes(data)(start, end))


def plain_words(column: Any) -> Words:
    """The words of the texts in lower case, with Unicode's punctuation as separators: two texts that differ in case,
    punctuation and spacing alone have the same hashes in the same order."""
    return words_of(*flat_bytes(plain(column)))


def plain(column: Any) -> Any:
    """The texts as :func:`plain_words` takes them."""
    return pc.replace_substring_regex(pc.utf8_lower(one_array(column)), _PUNCTUATION, " ")
