"""Span masking and token dropout: some inputs are hidden, and the model predicts every token as before.

Spans: Joshi et al., "SpanBERT" (1907.10529), with lengths that are geometric. Tokens one by one: word dropout, Bowman
et al., "Generating Sentences from a Continuous Space" (1511.06349).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.augment.augmentation import Augmentation, token_id, uniform
from megaforge.data.tokenizer import Tokenizer

_USUAL = ("<|mask|>", "<mask>", "[MASK]", "<|unk|>", "<unk>", "[UNK]")


class HiddenInputs(Augmentation):
    """Puts one token in the place of others, among the inputs only.

    Args:
        key: JSON-like, the seed.
        token: id that hides.
        span_rate, span_length: share of the inputs hidden in spans, and the spans' mean length in tokens.
        dropout: share of the inputs hidden one by one.
    """

    def __init__(self, key: object, token: int, span_rate: float, span_length: float, dropout: float) -> None:
        self._key, self._token = key, token
        self._span_rate, self._span_length, self._dropout = span_rate, span_length, dropout

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer | None) -> HiddenInputs | None:
        """As ``--span-mask-rate`` and ``--token-dropout`` say."""
        data = config.data
        if not data.span_mask_rate and not data.token_dropout:
            return None
        token = token_id("--mask-token", data.mask_token, _USUAL, tokenizer, config.model.vocab_size)
        return cls(config.training.seed, token, data.span_mask_rate, data.span_mask_length, data.token_dropout)

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The inputs with some hidden, int64 [S]; a copy."""
        hidden = uniform(len(inputs), "dropout", self._key, k) < self._dropout
        if self._span_rate:
            hidden |= self._in_spans(len(inputs), k)
        return np.where(hidden, self._token, inputs)

    def _in_spans(self, length: int, k: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` places lie in spans.

        A chain of two states, hidden and seen: a span goes on with probability 1 - 1/L, and one begins so often that a
        share ``span_rate`` of all places is hidden, of the first place too. So the share does not depend on the window.
        At least one token lies between two spans, so spans are as long as a large share needs.
        """
        odds = self._span_rate / (1 - self._span_rate)
        mean = max(self._span_length, odds)
        stay, begin = 1 - 1 / mean, odds / mean
        drawn = uniform(length, "spans", self._key, k)
        hidden, now = np.zeros(length, np.bool_), False
        for place, number in enumerate(drawn.tolist()):
            now = number < (self._span_rate if place == 0 else stay if now else begin)
            hidden[place] = now
        return hidden

    def state(self) -> dict[str, Any]:
        return {
            "--span-mask-rate": self._span_rate,
            "--span-mask-length": self._span_length,
            "--token-dropout": self._dropout,
            "the token of --mask-token": self._token,
        }
