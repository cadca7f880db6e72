"""A score of each document in [0, 1] from what can be counted, each part of it explained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaforge.config.fields import flag
from megaforge.data.corpus.features import Features, features_of
from megaforge.data.corpus.records import replaced
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings

# By the size of the model: a small one learns from much text that a large one is better without.
LEAST = {"1b": 0.4, "4b": 0.5, "40b": 0.7, "200b": 0.8}
_DEFAULT = 0.6
# Shares of the score: how much of it every document has whatever its worst part.
_FLOOR = 0.4


@dataclass(frozen=True)
class QualitySettings(StageSettings):
    """``quality``: a score in [0, 1]; 0.6 must be reached, or what model_scale says: 0.4 for 1b to 0.8 for 200b."""

    least: float | None = flag(
        None, "the score below which a document is dropped; by model_scale without one", least=0, most=1
    )

    def open(self, scope: Scope) -> Quality:
        """See :class:`StageSettings`."""
        least = self.least if self.least is not None else LEAST.get(scope.model_scale or "", _DEFAULT)
        return Quality(least)


class Quality(RowStage):
    """Sets ``quality``: the mean of the parts of :func:`parts`, times 0.4 + 0.6 of the worst of them."""

    def __init__(self, least: float) -> None:
        self.least = least

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        found = parts(features_of(records))
        names = list(found)
        values = np.stack([found[name] for name in names], axis=1)
        score = (np.nanmean(values, 1) * (_FLOOR + (1 - _FLOOR) * np.nanmin(values, 1))).astype(np.float32)
        score = np.minimum(score, np.float32(1))
        worst = np.argsort(np.nan_to_num(values, nan=1.0), axis=1, kind="stable")[:, :3]
        counts: Counter[str] = Counter()
        reasons: list[str | None] = []
        for row, quality in enumerate(score.tolist()):
            low = min(int(quality * 10), 9)
            counts[f"quality {low / 10:.1f} to {(low + 1) / 10:.1f}"] += 1
            if values[row, worst[row, 0]] < 1:
                counts[f"held back most by {names[worst[row, 0]]}"] += 1
            why = ", ".join(f"{names[part]} {values[row, part]:.2f}" for part in worst[row] if values[row, part] < 1)
            reasons.append(f"low quality ({quality:.2f}; {why})" if quality < self.least else None)
        return Outcome(replaced(records, quality=score.tolist()), reasons, None, dict(sorted(counts.items())))


def parts(found: Features) -> dict[str, np.ndarray]:
    """The parts of the score by name, each [rows] in [0, 1]; nan where it says nothing of a row: words of scripts
    without spaces, stop words of languages whose are not known, symbols of code."""
    prose, known = found.prose, found.has_stop_words
    return {
        "stop words": np.where(known, _rising(found.stop_words, 0.04, 0.2), np.nan),
        "word length": np.where(prose, _rising(found.word_length, 2, 3) * _falling(found.word_length, 8, 14), np.nan),
        "sentences": np.where(prose, _rising(found.sentences, 0, 0.015), np.nan),
        "vocabulary": np.where(prose, _rising(found.vocabulary, 1, 3), np.nan),
        "symbols": np.where(prose, _falling(found.symbols, 0.08, 0.3), np.nan),
        "digits": np.where(prose, _falling(found.digits, 0.08, 0.35), np.nan),
        "capitals": np.where(prose, _falling(found.capitals, 0.2, 0.7), np.nan),
        "punctuation": np.where(prose, _falling(found.punctuation, 0.15, 0.4), np.nan),
        "length": np.where(prose, _rising(found.words, 3, 30), 1.0),
        "repeated lines": _falling(np.maximum(found.repeated_lines, found.repeated_paragraphs), 0.15, 0.6),
        "repeated runs of words": _falling(found.repeated_runs, 0.2, 0.6),
    }


def _rising(values: np.ndarray, none: float, full: float) -> np.ndarray:
    """0 up to ``none``, 1 from ``full`` on, straight between."""
    return np.clip((values - none) / (full - none), 0, 1)


def _falling(values: np.ndarray, full: float, none: float) -> np.ndarray:
    """1 up to ``full``, 0 from ``none`` on, straight between."""
    return 1 - _rising(values, full, none)
