"""One long text as many documents, so that a part of a single file can be held out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megaforge.errors import UserError

BLANK_LINES, SIZE = "blank-lines", "size"
_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_CUTS = ("\n\n", "\n", " ")


class Splitter:
    """Cuts texts as ``--split-documents`` says: ``blank-lines``, ``size``, or at a marker, any other value.

    Attributes:
        found: whether a cut was made; a marker that is in no text is a mistake.
    """

    def __init__(self, how: str, size: int) -> None:
        self.how, self.size = how, size
        self.found = False

    def __call__(self, text: str) -> Iterator[str]:
        """The documents of a text, in order, without empty ones."""
        if self.how == SIZE:
            parts = list(_by_size(text, self.size))
        elif self.how == BLANK_LINES:
            parts = _BLANK.split(text)
        else:
            parts = [part.strip("\n") for part in text.split(self.how)]
        self.found = self.found or len(parts) > 1
        return (part for part in parts if part.strip())

    def check(self) -> None:
        """Raises:
        UserError: the marker was in none of the texts.
        """
        if not self.found and self.how not in (SIZE, BLANK_LINES):
            raise UserError(
                f"--split-documents {self.how}: no text holds this marker; give {BLANK_LINES}, {SIZE}, or a marker "
                "that stands between the documents, such as '<|endoftext|>'"
            )


def _by_size(text: str, size: int) -> Iterator[str]:
    """Parts of at most ``size`` characters, each cut at its last paragraph's, line's or word's end if that lies in its
    second half."""
    start = 0
    while len(text) - start > size:
        found = ((text.rfind(cut, start + size // 2, start + size), cut) for cut in _CUTS)
        end = next((place + len(cut) for place, cut in found if place >= 0), start + size)
        yield text[start:end]
        start = end
    yield text[start:]
