"""Fill-in-the-middle: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2207.14255).

A document is cut at two places into prefix, middle and suffix, and read as

    PSM: <prefix> prefix <suffix> suffix <middle> middle
    SPM: <prefix> <suffix> suffix <middle> prefix middle

Cuts lie between tokens. What a window holds of a document is rearranged on its own, so that a window stays a pure
function of its tokens; the three control tokens take the place of its last three tokens, and the token that ends the
document stays at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.augment.augmentation import Augmentation, token_id, uniform
from megaforge.data.tokenizer import Tokenizer

_USUAL = {
    part: (f"<|fim_{part}|>", f"<fim_{part}>", f"<fim-{part}>", f"<{part[:3].upper()}>")
    for part in ("prefix", "middle", "suffix")
}
_CONTROL = 3


class FillInTheMiddle(Augmentation):
    """Rearranges a share of the documents.

    Args:
        key: JSON-like, the seed.
        tokens: ids of <prefix>, <middle> and <suffix>.
        eod: the id that ends documents, or None.
        rate, spm_rate: share of the documents, and of these in SPM's order.
        rates: ``rate`` of some domains.
    """

    def __init__(
        self,
        key: object,
        tokens: tuple[int, int, int],
        eod: int | None,
        rate: float,
        spm_rate: float,
        rates: Mapping[str, float],
    ) -> None:
        self._key, self._tokens, self._eod = key, tokens, eod
        self._rate, self._spm_rate, self._rates = rate, spm_rate, rates

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer | None) -> FillInTheMiddle | None:
        """As ``--fim-data`` and the flags beside it say."""
        data = config.data
        if not data.fim_data:
            return None
        prefix, middle, suffix = (
            token_id(f"--fim-{part}-token", given, _USUAL[part], tokenizer, config.model.vocab_size)
            for part, given in (
                ("prefix", data.fim_prefix_token),
                ("middle", data.fim_middle_token),
                ("suffix", data.fim_suffix_token),
            )
        )
        eod = None if tokenizer is None else tokenizer.eod
        seed = config.training.seed
        return cls(seed, (prefix, middle, suffix), eod, data.fim_rate, data.fim_spm_rate, data.domain_rates)

    def rewrite(self, k: int, domain: str | None, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        """Rearranges the documents of the window that are drawn."""
        rate = self._rates.get(domain, self._rate) if domain is not None else self._rate
        if not rate:
            return
        edges = np.flatnonzero(marks)
        starts = [0, *edges[edges > 0].tolist()]
        stops = [*starts[1:], len(tokens)]
        drawn = uniform(4 * len(starts), "fim", self._key, k).reshape(-1, 4)
        for (chosen, spm, *cuts), start, stop in zip(drawn.tolist(), starts, stops, strict=True):
            if chosen < rate:
                self._rearrange(tokens[start:stop], spm < self._spm_rate, sorted(cuts))

    def _rearrange(self, document: npt.NDArray[np.int64], spm: bool, cuts: list[float]) -> None:
        """In place; ``cuts``: two ascending shares of its length. One of fewer than four tokens stays."""
        ends = len(document) > 0 and document[-1] == self._eod
        length = len(document) - ends - _CONTROL
        if length < 1:
            return
        first, second = (int(cut * (length + 1)) for cut in cuts)
        prefix, middle, suffix = np.split(document[:length].copy(), [first, second])
        begin, fill, end = ([token] for token in self._tokens)
        parts = (begin, end, suffix, fill, prefix, middle) if spm else (begin, prefix, end, suffix, fill, middle)
        np.concatenate(parts, out=document[: length + _CONTROL])

    def state(self) -> dict[str, Any]:
        return {
            "--fim-rate": self._rate,
            "--fim-spm-rate": self._spm_rate,
            "--fim-domain-rates": dict(self._rates),
            "the tokens of --fim-data": list(self._tokens),
        }
