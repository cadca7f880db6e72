"""What a reader of the corpus pipeline is: a file's documents with their fields, from any place on, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.corpus.records import TEXT
from megaforge.data.text.formats import plain_suffix
from megaforge.errors import UserError
from megaforge.registry import CORPUS_READERS

FIELDS = ("url", "licence", "date")


@dataclass
class Rows:
    """Some records of a file, in its order.

    Attributes:
        texts: a document a record; None of a record that has none.
        places: where each begins: the byte of its line, or its row; 0 of a whole file.
        reasons: why a record has no document; None of one that has.
        fields: of ``url``, ``licence`` and ``date`` a value a record, or nothing at all.
    """

    texts: list[str | None] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    fields: dict[str, list[str | None]] = field(default_factory=dict)

    def add(self, place: int, text: str | None, reason: str | None = None, record: Mapping[str, Any] = {}) -> None:
        """Appends a record; ``record`` holds values of :data:`FIELDS`."""
        self.texts.append(text)
        self.places.append(place)
        self.reasons.append(reason)
        for name in FIELDS:
            self.fields.setdefault(name, []).append(as_text(record.get(name)))


class Reader(ABC):
    """Reads files of one format.

    Attributes:
        suffixes: of the files that it reads, in lower case, a compression's left away.
        whole: whether a file is one document.
        unit: what a place is, in messages.
    """

    suffixes: tuple[str, ...] = ()
    whole: bool = True
    unit: str = "document"

    def reads(self, path: str) -> bool:
        """Whether it reads files of this name."""
        return plain_suffix(path) in self.suffixes

    def kind(self, path: str) -> str:
        """What the texts are: text, html or code."""
        return TEXT

    def places(self, path: str, source: SourceSettings) -> int:
        """The end of a file's places, or about where it is, if it can be cut between them; 0: it is read in one go.

        Raises:
            UserError: the file is not what its name says, or lacks the text.
        """
        return 0

    @abstractmethod
    def read(self, path: str, source: SourceSettings, start: int, stop: int | None) -> Iterator[Rows]:
        """The records that begin in [start, stop) (None: to the end).

        Raises:
            UserError: the file is damaged; what was read before was right.
        """

    def line(self, path: str, place: int) -> str:
        """``, line 3`` of messages about the record at ``place``."""
        return "" if self.whole else f", {self.unit} {place}"


def reader_named(name: str) -> Reader:
    """A reader by its name in the registry."""
    reader: Reader = CORPUS_READERS.get(name)()
    return reader


def reader_for(path: str) -> str | None:
    """The name of the reader of files with this name; None: none reads such files."""
    return next((name for name in CORPUS_READERS.names() if reader_named(name).reads(path)), None)


def as_text(value: object) -> str | None:
    """A field's value as text; None where it has none."""
    if value is None or isinstance(value, (dict, list, tuple)):
        return None
    return str(value)


def missing_column(path: str, key: str, names: list[str]) -> UserError:
    """The complaint about a table without the text."""
    return UserError(f"{path}: no column {key!r} (text_field); there are {', '.join(names)}")
