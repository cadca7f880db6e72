"""The one reader of text inputs: documents of a file, whatever its format, from any place on and in bounded memory.

A place is a byte of a JSON Lines file's (decompressed) content, or a document's number where the format counts
documents. A range [start, stop) of places owns the documents that begin in it, so any cut of a file into ranges gives
every document to exactly one of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

from megaforge.data.corpus.decode import NotText, decode
from megaforge.data.jsonl import LineReader, is_compressed
from megaforge.data.text.formats import TextFormat, text_format
from megaforge.errors import UserError, require


@dataclass
class Chunk:
    """Some documents of a file, in its order.

    Attributes:
        texts: the documents.
        records: lines (or rows) read for them, bad and empty ones among them.
        input_bytes: their size in the input.
        text_bytes: UTF-8 bytes of ``texts``.
        bad: (number in the chunk, from 0; reason) of the records that give no text.
        empty: numbers in the chunk of empty lines and texts, which are neither documents nor mistakes.
    """

    texts: list[str] = field(default_factory=list)
    records: int = 0
    input_bytes: int = 0
    text_bytes: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)

    @property
    def numbers(self) -> list[int]:
        """The number in the chunk of each text's record."""
        others = {*self.empty, *(number for number, _ in self.bad)}
        return [number for number in range(self.records) if number not in others]

    def add(self, text: str) -> None:
        """Appends a document."""
        self.texts.append(text)
        self.text_bytes += len(text) if text.isascii() else len(text.encode())


class TextReader(ABC):
    """An open file of documents.

    Attributes:
        unit: what its records are called: line, row or document.
    """

    unit: str

    def __init__(self, path: str, key: str) -> None:
        self.path, self.key = path, key

    @abstractmethod
    def goto(self, start: int) -> None:
        """Moves to the first document that begins at or after the place ``start``."""

    @abstractmethod
    def chunks(self, stop: int | None) -> Iterator[Chunk]:
        """The documents that begin before the place ``stop`` (None: to the end), in bounded chunks."""

    @abstractmethod
    def at_end(self) -> bool:
        """Whether no document is left."""

    @abstractmethod
    def count_records(self, stop: int) -> int:
        """The number of records that begin before the place ``stop``, from the file's beginning."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file."""

    def __enter__(self) -> TextReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLinesReader(TextReader):
    """The strings under ``key`` of a JSON Lines file; places are bytes."""

    unit = "line"

    def __init__(self, path: str, key: str) -> None:
        super().__init__(path, key)
        self._loads = require("orjson", extra="data", purpose="reading JSONL").loads
        self._lines = LineReader(path)

    def goto(self, start: int) -> None:
        """See :class:`TextReader`."""
        self._lines.goto(start)

    def chunks(self, stop: int | None) -> Iterator[Chunk]:
        """See :class:`TextReader`."""
        for lines in self._lines.chunks(stop):
            yield self._chunk(lines)

    def at_end(self) -> bool:
        """See :class:`TextReader`."""
        return self._lines.at_end()

    def count_records(self, stop: int) -> int:
        """See :class:`TextReader`."""
        return self._lines.count_lines(stop)

    def close(self) -> None:
        """See :class:`TextReader`."""
        self._lines.close()

    def _chunk(self, lines: list[bytes]) -> Chunk:
        key, loads = self.key, self._loads
        texts: list[str] = []
        bad: list[tuple[int, str]] = []
        empty: list[int] = []
        size = 0
        for number, line in enumerate(lines):
            try:
                text = loads(line)[key]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if line.isspace():
                    empty.append(number)
                else:
                    bad.append((number, _reason(error, key)))
                continue
            if type(text) is not str:
                bad.append((number, not_a_string(key, text)))
                continue
            texts.append(text)
            size += len(text) if text.isascii() else len(text.encode())
        return Chunk(texts, len(lines), sum(map(len, lines)), size, bad, empty)


class WholeTextReader(TextReader):
    """A text file as one document, decoded as :func:`megaforge.data.corpus.decode.decode` does; its place is 0."""

    unit = "document"

    def __init__(self, path: str, key: str) -> None:
        super().__init__(path, key)
        with LineReader(path) as reader:
            self._content = reader.rest()
        self._read = False

    def goto(self, start: int) -> None:
        """See :class:`TextReader`."""
        self._read = start > 0

    def chunks(self, stop: int | None) -> Iterator[Chunk]:
        """See :class:`TextReader`."""
        if self._read or stop == 0:
            return
        self._read = True
        chunk = Chunk(records=1, input_bytes=len(self._content))
        try:
            text = decode(self._content)
        except NotText as error:
            chunk.bad.append((0, str(error)))
        else:
            if text.strip():
                chunk.add(text)
            else:
                chunk.empty.append(0)
        yield chunk

    def at_end(self) -> bool:
        """See :class:`TextReader`."""
        return self._read

    def count_records(self, stop: int) -> int:
        """See :class:`TextReader`."""
        return min(stop, 1)

    def close(self) -> None:
        """See :class:`TextReader`."""
        self._content = b""


def open_text(path: str, key: str) -> TextReader:
    """The reader of ``--input PATH``.

    Raises:
        UserError: see :func:`megaforge.data.text.formats.text_format`.
    """
    form = text_format(path)
    if form.is_table:
        from megaforge.data.text.tables import TableReader  # it is built on this module, and few inputs are tables

        return TableReader(path, key, form)
    return (JsonLinesReader if form is TextFormat.LINES else WholeTextReader)(path, key)


def read_texts(path: str, key: str) -> Iterator[str]:
    """Every document of ``--input PATH``.

    Raises:
        UserError: the file is bad, or a record of it, which the message names.
    """
    with open_text(path, key) as reader:
        before = 0
        for chunk in reader.chunks(None):
            if chunk.bad:
                number, reason = chunk.bad[0]
                raise UserError(f"--input {path}{place(reader, before + number + 1)}: {reason}")
            before += chunk.records
            yield from chunk.texts


def input_size(path: str, key: str) -> int:
    """Bytes of ``--input PATH`` once decompressed, or of a table's text; both are read for it."""
    with open_text(path, key) as reader:
        if not is_compressed(path) and reader.unit != "row":
            return os.path.getsize(path)
        return sum(chunk.input_bytes for chunk in reader.chunks(None))


def place(reader: TextReader, number: int) -> str:
    """``, line 3`` of a message; nothing where the file is one document."""
    return "" if reader.unit == "document" else f", {reader.unit} {number}"


def not_a_string(key: str, value: object) -> str:
    """The reason against a record whose ``key`` holds something else than text."""
    shown = repr(value)
    return f"{key!r} is not a string ({shown if len(shown) <= 40 else f'{shown[:37]}...'})"


def _reason(error: Exception, key: str) -> str:
    if isinstance(error, KeyError):
        return f"the record has no key {key!r} (--json-key)"
    if isinstance(error, ValueError):
        return f"not valid JSON ({error})"
    return "the line is JSON but no object"
