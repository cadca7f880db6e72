"""Near-duplicates by SimHash (Charikar 2002; Manku, Jain and Das Sarma 2007): documents whose fingerprints of 64 bits
differ in few."""

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

_WORDS_AT_ONCE = 1 << 18
_ONES = np.array([bin(value).count("1") for value in range(256)], np.uint8)


@dataclass(frozen=True)
class SimhashSettings(StageSettings):
    """``simhash``: documents of nearly the same words; coarser than minhash. The best of each cluster stays."""

    distance: int = flag(3, "bits in which fingerprints of near-duplicates may differ, of 64", least=0, most=15)
    ngram: int = flag(2, "words of a run that counts as one", least=1, most=64)
    buckets: int = flag(16, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> Simhash:
        """See :class:`StageSettings`."""
        return Simhash(self)


class Simhash(JoinStage):
    """Cuts fingerprints into one block more than bits may differ: near-duplicates have one block in common."""

    def __init__(self, settings: SimhashSettings) -> None:
        self._settings, self.buckets = settings, settings.buckets

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: one row for each block of each fingerprint."""
        words = plain_words(records["text"])
        prints = fingerprints(words, self._settings.ngram)
        rows = np.flatnonzero(words.counts >= self._settings.ngram)
        blocks = self._settings.distance + 1
        edges = [64 * block // blocks for block in range(blocks + 1)]
        keys = np.empty((len(rows), blocks), np.uint64)
        for block, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            bits = np.uint64((1 << (high - low)) - 1)
            keys[:, block] = mix(mix(prints[rows] >> np.uint64(low) & bits) + np.uint64(block + 1))
        every = np.repeat(rows, blocks)
        return pa.table(
            {
                "key": keys.ravel(),
                "id": records["id"].to_numpy()[every],
                "quality": quality_of(records)[every],
                "length": words.counts[every],
                "print": prints[every],
            }
        )

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: pairs of one block whose fingerprints differ in few bits."""
        prints = sketches["print"].to_numpy()
        return pairs_alike(
            sketches, lambda one, other: differing_bits(prints[one], prints[other]) <= self._settings.distance
        )

    def decide(self, joined: Any) -> Any:
        """See :class:`JoinStage`."""
        return keep_best(joined, "near-duplicate")

    def apply(self, records: Any, decisions: Any) -> Outcome:
        """See :class:`JoinStage`."""
        outcome = super().apply(records, decisions)
        return Outcome(records, outcome.reasons, counts=cluster_counts(decisions))


def fingerprints(words: Words, n: int) -> np.ndarray:
    """The fingerprint of each row [rows] uint64: the bits that most of the hashes of its runs of ``n`` words have."""
    owner, grams = words.ngrams(n)
    sums = np.zeros((len(words.counts), 64), np.int64)
    for begin in range(0, len(grams), _WORDS_AT_ONCE):
        row = owner[begin : begin + _WORDS_AT_ONCE]
        bits = np.unpackbits(grams[begin : begin + _WORDS_AT_ONCE].view(np.uint8), bitorder="little").reshape(-1, 64)
        first = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
        sums[row[first]] += np.add.reduceat(bits, first, axis=0, dtype=np.int64)
    runs = np.bincount(owner, minlength=len(words.counts))
    return np.packbits(2 * sums > runs[:, None], axis=1, bitorder="little").view(np.uint64).ravel()


def differing_bits(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In how many bits each pair of uint64 differs [pairs] int64."""
    return _ONES[(one ^ other).view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.int64)
