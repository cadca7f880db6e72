"""The documents of one partition, read from its files in batches that every stage can hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megaforge.data.corpus.job import Job
from megaforge.data.corpus.readers.reader import FIELDS, Reader, Rows, reader_named
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.corpus.records import make_records, row_id
from megaforge.data.corpus.remote import copied
from megaforge.data.corpus.sources import Piece, check_unchanged
from megaforge.errors import UserError

MAX_ROWS = 1024
MAX_BYTES = 4 << 20


class _Batch:
    """Records that wait to become a table."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("id", "text", "source", "path", "place", "domain", "kind", *FIELDS)
        }
        self.reasons: list[str | None] = []
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, reason: str | None, **values: Any) -> None:
        """Appends a record."""
        for name, value in values.items():
            self.columns[name].append(value)
        self.reasons.append(reason)
        self.bytes += len(values["text"])

    def tables(self) -> tuple[Any, Any, list[str]]:
        """(good records, bad ones, why)."""
        good = [number for number, reason in enumerate(self.reasons) if reason is None]
        bad = [number for number, reason in enumerate(self.reasons) if reason is not None]
        return self._table(good), self._table(bad), [reason for reason in self.reasons if reason is not None]

    def _table(self, rows: list[int]) -> Any:
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        texts = columns.pop("text")
        digests = [hashlib.sha256(text).hexdigest() for text in texts]
        return make_records(texts, digest=digests, **columns)


def read_partition(job: Job, item: int) -> Iterator[tuple[Any, Any, list[str]]]:
    """(records, records without a text, why they have none) of a partition, in batches of at most ``MAX_ROWS`` rows.

    Raises:
        UserError: under ``--on-error fail`` a bad record or a damaged file; a file that changed since the run began.
    """
    batch, row = _Batch(), 0
    for piece in job.partitions[item]:
        unit = job.units[piece.unit]
        source, reader = job.recipe.sources[unit.source], reader_named(unit.reader)
        check_unchanged(unit)
        with _local(job, piece.unit) as path:
            kind = reader.kind(path)
            for rows in _pieces(job, piece, reader, path):
                for number, text in enumerate(rows.texts):
                    content, reason = _checked(text, rows.reasons[number])
                    if reason is not None and reason != _EMPTY and job.on_error == "fail":
                        where = f"{unit.label}{reader.line(path, rows.places[number])}"
                        raise UserError(f"{where}: {reason}; fix it, exclude the file, or pass --on-error skip")
                    batch.add(
                        reason,
                        id=row_id(item, row),
                        text=content,
                        source=source.name,
                        path=unit.shown,
                        place=rows.places[number],
                        domain=source.domain,
                        kind=kind,
                        **_fields(rows, number, source, unit.path if unit.remote and reader.whole else None),
                    )
                    row += 1
                    if len(batch) >= MAX_ROWS or batch.bytes >= MAX_BYTES:
                        yield batch.tables()
                        batch = _Batch()
        check_unchanged(unit)
    if len(batch):
        yield batch.tables()


_EMPTY = "empty"


def _local(job: Job, number: int) -> AbstractContextManager[str]:
    """The path of a unit's file; of a remote one that of a copy, which goes with the block."""
    unit = job.units[number]
    return copied(unit.path, job.work.path / "copies", number) if unit.remote else nullcontext(unit.path)


def _fields(rows: Rows, number: int, source: SourceSettings, address: str | None) -> dict[str, str | None]:
    """A record's fields, with what its source and its file's ``address`` say where the record does not."""
    fields = {name: rows.fields[name][number] for name in FIELDS}
    return {**fields, "licence": fields["licence"] or source.licence, "url": fields["url"] or address}


def _checked(text: str | None, reason: str | None) -> tuple[bytes, str | None]:
    """The UTF-8 of a record's text, and why it is dropped as it is read; None: it is not."""
    if text is None:
        return b"", reason
    if not text or text.isspace():
        return b"", _EMPTY
    try:
        return text.encode(), None
    except UnicodeEncodeError as error:
        return b"", f"half a character that UTF-8 cannot hold (at {error.start})"


def _pieces(job: Job, piece: Piece, reader: Reader, path: str) -> Iterator[Rows]:
    """The records of a piece at ``path``; with ``--on-error skip`` a damaged file ends with a record that says so."""
    unit = job.units[piece.unit]
    source = job.recipe.sources[unit.source]
    try:
        yield from reader.read(path, source, piece.start, piece.stop)
    except (UserError, OSError) as error:
        reason = str(error).removeprefix("--input ").removeprefix(f"{path}: ")
        reason = reason.removeprefix(f"{unit.label}: ")
        if job.on_error == "fail":
            raise UserError(f"{unit.label}: {reason}; fix it, exclude it, or pass --on-error skip") from error
        rows = Rows()
        rows.add(piece.start, None, f"a file that cannot be read on ({reason})")
        yield rows
