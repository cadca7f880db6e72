"""Near-duplicates by MinHash signatures (Broder 1997) and locality-sensitive hashing of their bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megaforge.config.fields import flag
from megaforge.data.corpus.clusters import cluster_counts, keep_best, pairs_alike
from megaforge.data.corpus.columns import quality_of
from megaforge.data.corpus.runs import BINS, signatures
from megaforge.data.corpus.stage import JoinStage, Outcome, Scope, StageSettings
from megaforge.data.corpus.words import mix, plain_words

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
        values = signatures(words, self._settings.ngram)
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


def _bytes_of(column: Any, width: int) -> np.ndarray:
    array = column.combine_chunks()
    if not len(array):
        return np.zeros((0, width), np.uint8)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
