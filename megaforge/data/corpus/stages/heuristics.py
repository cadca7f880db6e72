"""Documents that are not running text by simple counts: symbol soup, number tables, lists of keywords, repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megaforge.config.fields import flag
from megaforge.data.corpus.features import Features, features_of
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.errors import UserError


@dataclass(frozen=True)
class HeuristicsSettings(StageSettings):
    """``heuristics``: limits on what can be counted; of code only the repetition is judged."""

    least_words: int = flag(10, "words; fewer are dropped", least=0)
    least_word_length: float = flag(2.0, "mean characters of a word, of scripts with spaces", least=0)
    most_word_length: float = flag(14.0, "mean characters of a word, of scripts with spaces", above=0)
    most_symbols: float = flag(0.2, "share of symbols such as # { | in what is not space", least=0, most=1)
    most_digits: float = flag(0.3, "share of digits in what is not space", least=0, most=1)
    most_capitals: float = flag(0.6, "share of capitals in the letters", least=0, most=1)
    most_punctuation: float = flag(0.3, "share of . , ; : ! ? ' \" ( ) - in what is not space", least=0, most=1)
    least_stop_words: float = flag(0.06, "share of the commonest words of its language in the words", least=0, most=1)
    most_repeated_lines: float = flag(0.4, "share of bytes in lines that occurred before", least=0, most=1)
    most_repeated_paragraphs: float = flag(0.4, "share of bytes in paragraphs that occurred before", least=0, most=1)
    most_top_pair: float = flag(0.25, "share of the words that are in the commonest pair of words", least=0, most=1)
    most_repeated_runs: float = flag(0.4, "share of runs of five words that occurred before", least=0, most=1)

    def validate(self) -> None:
        """
        Raises:
            UserError: no word length is between the two.
        """
        if self.least_word_length > self.most_word_length:
            raise UserError(
                f"least_word_length {self.least_word_length}: must be at most most_word_length, {self.most_word_length}"
            )

    def open(self, scope: Scope) -> Heuristics:
        """See :class:`StageSettings`."""
        return Heuristics(self)


class Heuristics(RowStage):
    """Drops a document for the first limit that it breaks."""

    def __init__(self, settings: HeuristicsSettings) -> None:
        self._settings = settings

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        reasons: list[str | None] = [None] * records.num_rows
        for words, value, broken in self._rules(features_of(records)):
            for row in np.flatnonzero(broken).tolist():
                if reasons[row] is None:
                    reasons[row] = f"{words} ({value[row]:.3g})"
        return Outcome(records, reasons)

    def _rules(self, found: Features) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """What is wrong, the number that says so, and in which rows."""
        limits, prose = self._settings, found.prose
        return [
            ("few words", found.words, (found.words < limits.least_words) & prose),
            ("short words", found.word_length, (found.word_length < limits.least_word_length) & prose),
            ("long words", found.word_length, (found.word_length > limits.most_word_length) & prose),
            ("many symbols", found.symbols, (found.symbols > limits.most_symbols) & prose),
            ("many digits", found.digits, (found.digits > limits.most_digits) & prose),
            ("many capitals", found.capitals, (found.capitals > limits.most_capitals) & prose),
            ("much punctuation", found.punctuation, (found.punctuation > limits.most_punctuation) & prose),
            (
                "few stop words",
                found.stop_words,
                (found.stop_words < limits.least_stop_words) & found.has_stop_words,
            ),
            ("repeated lines", found.repeated_lines, found.repeated_lines > limits.most_repeated_lines),
            (
                "repeated paragraphs",
                found.repeated_paragraphs,
                found.repeated_paragraphs > limits.most_repeated_paragraphs,
            ),
            ("one pair of words", found.top_pair, (found.top_pair > limits.most_top_pair) & prose),
            ("repeated runs of words", found.repeated_runs, found.repeated_runs > limits.most_repeated_runs),
        ]
