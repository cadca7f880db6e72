"""Tokens as text while they are drawn: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megaforge.data.tokenizer import Tokenizer

_CONTEXT = 8  # tokens before the new ones that are decoded with them: some tokenizers need them for a space


class TextStream:
    """The text of one continuation.

    Attributes:
        text: everything that is certain so far.
        stopped: the stop string that ended it, or None; ``text`` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text = ""
        self.stopped: str | None = None
        self._tokens = list(prompt[-_CONTEXT:])
        self._first, self._read = 0, len(self._tokens)
        self._given = 0

    def add(self, token: int) -> str:
        """Takes in one more token; what can be shown now."""
        self._tokens.append(token)
        self._take(final=False)
        return self._give(final=False)

    def close(self) -> str:
        """No token follows; what was held back."""
        if self.stopped is None:
            self._take(final=True)
        return self._give(final=True)

    def _take(self, final: bool) -> None:
        before = self.tokenizer.decode(self._tokens[self._first : self._read])
        whole = self.tokenizer.decode(self._tokens[self._first :])
        # U+FFFD at the end: a character whose last bytes are to come.
        if len(whole) <= len(before) or (whole.endswith("\ufffd") and not final):
            return
        start = len(self.text)
        self.text += whole[len(before) :]
        self._first, self._read = self._read, len(self._tokens)
        places = [(self.text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in self.stops]
        found = [place for place in places if place[0] >= 0]
        if found:
            end, self.stopped = min(found)
            self.text = self.text[:end]

    def _give(self, final: bool) -> str:
        held = 0 if final or self.stopped is not None else max(map(self._overlap, self.stops), default=0)
        end = max(len(self.text) - held, self._given)
        new, self._given = self.text[self._given : end], end
        return new

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the text that may be the beginning of ``stop``."""
        longest = min(len(stop) - 1, len(self.text))
        return next((size for size in range(longest, 0, -1) if self.text.endswith(stop[:size])), 0)
