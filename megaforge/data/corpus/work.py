"""The work directory of a run, ``work`` in its output: what each finished task left, published whole, and the journal
of what is finished.

plan.json               what the run is of, and its partitions
recipe.yaml             the corpus.yaml as it was when the run began
PHASE/ITEM.NAME.arrow   tables that a task left
PHASE/ITEM.json         written last: the task is finished, and what it counted
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megaforge.durable import give_name
from megaforge.errors import UserError
from megaforge.json_text import parse_json

_COMPRESSION = "lz4"  # tables live for hours: speed counts, not size


@dataclass(frozen=True)
class Work:
    """``OUTPUT/work``."""

    path: Path

    def finished(self, phase: str) -> set[str]:
        """The items of a phase whose tasks are finished."""
        try:
            names = os.listdir(self.path / phase)
        except FileNotFoundError:
            return set()
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def is_finished(self, phase: str, item: str) -> bool:
        """Whether the task of one item is finished."""
        return (self.path / phase / f"{item}.json").exists()

    def result(self, phase: str, item: str) -> Any:
        """What a finished task counted.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / phase / f"{item}.json"
        try:
            return parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: missing or damaged; remove {self.path} and run the command again") from error

    def table(self, phase: str, item: str, name: str) -> Path:
        """The file of a table that a task leaves."""
        return self.path / phase / f"{item}.{name}.arrow"

    def finish(self, phase: str, item: str, result: object) -> None:
        """Says that a task is finished; its files are on the disk already."""
        write_json(self.path / phase / f"{item}.json", result)

    def remove(self, phase: str, *names: str) -> None:
        """Removes the tables of these names, which nothing will read again."""
        for name in names:
            for path in (self.path / phase).glob(f"*.{name}.arrow"):
                path.unlink()

    def clear(self) -> None:
        """Removes everything but the lock."""
        for path in self.path.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class TableWriter:
    """Writes an Arrow file batch by batch; it takes its name when it is whole and on the disk."""

    def __init__(self, path: Path, schema: Any) -> None:
        self.path = path
        self._temporary = temporary(path)
        self._file = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._file, schema, options=pa.ipc.IpcWriteOptions(compression=_COMPRESSION))
        self.rows = 0

    def write(self, table: Any) -> None:
        """Appends the rows as one batch; none at all make an empty batch."""
        batches = table.combine_chunks().to_batches()
        batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        assert len(batches) < 2, "one batch: a table of combined chunks"
        self._writer.write_batch(batch)
        self.rows += table.num_rows

    def close(self) -> None:
        """Publishes the file."""
        self._writer.close()
        self._file.close()
        give_name(self._temporary, self.path)

    def abandon(self) -> None:
        """Removes what was written; on a full disk closing fails as writing did."""
        for part in (self._writer, self._file):
            with suppress(OSError, pa.ArrowException):
                part.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, schema: Any) -> Iterator[TableWriter]:
    """A :class:`TableWriter` whose file appears when the block ends well."""
    writer = TableWriter(path, schema)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
    writer.close()


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The open Arrow file of a table, mapped into memory.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove {path.parents[1]} and run the command again") from error


def batches(path: Path) -> Iterator[Any]:
    """The batches of a table's file, as tables."""
    with reading(path) as opened:
        for number in range(opened.num_record_batches):
            yield pa.Table.from_batches([opened.get_batch(number)])


def read_all(path: Path) -> Any:
    """A whole table."""
    with reading(path) as opened:
        return opened.read_all()


def temporary(path: Path) -> Path:
    """What this process calls ``path`` until it is whole."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def write_json(path: Path, value: object) -> None:
    """Writes JSON whole or not at all; it is on the disk, name and all, when this returns."""
    partial = temporary(path)
    partial.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    give_name(partial, path)
