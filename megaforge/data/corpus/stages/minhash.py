"""Near-duplicates by MinHash signatures (Broder 1997) and locality-sensitive hashing of their bands.

A signature is made by one permutation (Li, Owen and Zhang 2012, "One Permutation Hashing"): every hash of a run of
words belongs to one bin, each bin keeps its smallest. Bins that stay empty take the value of another, chosen by hashing
(Shrivastava 2017, "Optimal Densification for Fast and Accurate Minwise Hashing").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.clusters import cluster_counts, keep_best, pairs_alike
from megaforge.data.corpus.columns import quality_of
from megaforge.data.corpus.stage import JoinStage, Outcome, Scope, StageSettings
from megaforge.data.corpus.words import Words, mix, plain_words

BINS = 128
_BIN_BITS = 7
_VALUE = np.uint64((1 << 64 - _BIN_BITS) - 1)  # the bits of a hash that do not say its bin
_NOTHING = np.uint64((1 << 64) - 1)
# The estimate from 128 bins is off by 0.035 (one standard deviation at 0.8): so much below it still counts.
MARGIN = 0.05


@dataclass(frozen=True)
class MinhashSettings(StageSettings):
    """``minhash``: documents that share most of their runs of words; the best of each cluster stays."""

    threshold: float = flag(
        0.8, "Jaccard similarity of the runs of words that makes near-duplicates", least=0.3, most=1
    )
    ngram: int = flag(5, "words of a run", least=1, most=64)
    buckets: int = flag(64, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> Minhash:
        """See :class:`StageSettings`."""
        return Minhash(self)


class Minhash(JoinStage):
    """Joins documents whose signatures agree, found by the bands that they have in common."""

    def __init__(self, settings: MinhashSettings) -> None:
        self._settings, self.buckets = settings, settings.buckets
        self.rows_of_band = band_rows(settings.threshold)

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: one row for each band of each document, with a byte of every bin."""
        words = plain_words(records["text"])
        rows = np.flatnonzero(words.counts > 0)
        values = signatures(words, self._settings.ngram, rows)
        bands = BINS // self.rows_of_band
        grouped = values.reshape(len(rows), bands, self.rows_of_band)
        keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (len(rows), bands)).copy()
        for value in range(self.rows_of_band):
            keys = mix(keys * np.uint64(31) + grouped[:, :, value])
        small = np.repeat((values & np.uint64(255)).astype(np.uint8), bands, axis=0)
        every = np.repeat(rows, bands)
        return pa.table(
            {
                "key": keys.ravel(),
                "id": records["id"].to_numpy()[every],
                "quality": quality_of(records)[every],
                "length": words.counts[every],
                "bins": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(BINS), len(every), [None, pa.py_buffer(small.tobytes())]
                ),
            }
        )

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: pairs of one band whose bins agree."""
        bins = _bytes_of(sketches["bins"], BINS)
        least = self._settings.threshold - MARGIN

        def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            agree = np.zeros(len(one), bool)
            for begin in range(0, len(one), 1 << 16):
                part = slice(begin, begin + (1 << 16))
                equal = (bins[one[part]] == bins[other[part]]).sum(1)
                # A byte of two unlike bins is the same once in 256.
                agree[part] = (equal / BINS - 1 / 256) / (1 - 1 / 256) >= least
            return agree

        return pairs_alike(sketches, alike)

    def decide(self, joined: Any) -> Any:
        """See :class:`JoinStage`."""
        return keep_best(joined, "near-duplicate")

    def apply(self, records: Any, decisions: Any) -> Outcome:
        """See :class:`JoinStage`."""
        outcome = super().apply(records, decisions)
        return Outcome(records, outcome.reasons, counts=cluster_counts(decisions))


def band_rows(threshold: float) -> int:
    """The most bins in a band for which 99 % of the pairs 0.05 above the threshold have a band in common."""
    likely = min(threshold + MARGIN, 1.0)
    fits = [rows for rows in (1, 2, 4, 8, 16, 32) if (1 - likely**rows) ** (BINS // rows) <= 0.01]
    return max(fits)


def signatures(words: Words, n: int, rows: np.ndarray) -> np.ndarray:
    """The signatures of the named rows (each with at least one word) [rows, 128] uint64. A row of fewer words than
    ``n`` has one run, all of its words."""
    owner, grams = words.ngrams(n)
    short = np.flatnonzero((words.counts > 0) & (words.counts < n))
    if len(short):
        whole = np.array([_whole(words.hash[words.first[row] : words.first[row + 1]]) for row in short], np.uint64)
        owner, grams = np.concatenate([owner, short]), np.concatenate([grams, whole])
    number = np.zeros(len(words.counts), np.int64)
    number[rows] = np.arange(len(rows))
    result = np.full((len(rows), BINS), _NOTHING, np.uint64)
    place = number[owner] * BINS + (grams >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
    np.minimum.at(result.reshape(-1), place, grams & _VALUE)
    return _densified(result)


def _whole(hashes: np.ndarray) -> np.uint64:
    gram = np.zeros(1, np.uint64)
    for one in hashes:
        gram = mix(gram * np.uint64(31) + one)
    return gram[0]


def _densified(values: np.ndarray) -> np.ndarray:
    """Empty bins take the value of one that is not: the first such of a sequence that is a hash of the empty bin."""
    filled = values != _NOTHING
    row, empty = np.nonzero(~filled)
    attempt = 0
    while len(row):
        attempt += 1
        candidates = mix(np.arange(BINS, dtype=np.uint64) + np.uint64(attempt * BINS)) % np.uint64(BINS)
        candidate = candidates.astype(np.int64)[empty]
        found = filled[row, candidate]
        values[row[found], empty[found]] = values[row[found], candidate[found]]
        row, empty = row[~found], empty[~found]
    return values


def _bytes_of(column: Any, width: int) -> np.ndarray:
    array = column.combine_chunks()
    if not len(array):
        return np.zeros((0, width), np.uint8)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
