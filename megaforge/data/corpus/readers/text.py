"""Text and source files, also .gz and .zst: one document each."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megaforge.data.corpus.decode import NotText, decode
from megaforge.data.corpus.directory import NAMES, SOURCE
from megaforge.data.corpus.readers.reader import Reader, Rows
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.corpus.records import CODE, TEXT
from megaforge.data.jsonl import LineReader
from megaforge.data.text.formats import PROSE, plain_suffix

_MARKUP = {".html", ".htm", ".xhtml"}


class WholeTexts(Reader):
    """A file's bytes, decoded."""

    suffixes = tuple(sorted((PROSE | SOURCE) - _MARKUP))

    def reads(self, path: str) -> bool:
        """See :class:`Reader`; by names such as README and copyright too."""
        return super().reads(path) or (not plain_suffix(path) and os.path.basename(path).lower() in NAMES)

    def kind(self, path: str) -> str:
        """See :class:`Reader`."""
        return CODE if plain_suffix(path) in SOURCE else TEXT

    def read(self, path: str, source: SourceSettings, start: int, stop: int | None) -> Iterator[Rows]:
        """See :class:`Reader`."""
        with LineReader(path) as reader:
            data = reader.rest()
        rows = Rows()
        try:
            rows.add(0, self.text(data))
        except NotText as error:
            rows.add(0, None, str(error))
        yield rows

    def text(self, data: bytes) -> str:
        """The text of a file's bytes.

        Raises:
            NotText: they cannot be decoded.
        """
        return decode(data)
