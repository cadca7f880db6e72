"""Parquet files, and the Arrow files of Hugging Face's ``datasets``: a document a row. A place is a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megaforge.data.corpus.readers.reader import Reader, Rows, missing_column
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.text.readers import not_a_string
from megaforge.data.text.tables import arrow_batches
from megaforge.errors import UserError

_ROWS = 1024


class Tables(Reader):
    """Rows with the text in column ``text_field``."""

    suffixes = (".parquet", ".arrow")
    whole = False
    unit = "row"

    def places(self, path: str, source: SourceSettings) -> int:
        """See :class:`Reader`: rows."""
        with _opened(path) as table:
            if source.text_field not in table.names:
                raise missing_column(path, source.text_field, table.names)
            return table.rows

    def read(self, path: str, source: SourceSettings, start: int, stop: int | None) -> Iterator[Rows]:
        """See :class:`Reader`."""
        keys = {"url": source.url_field, "licence": source.licence_field, "date": source.date_field}
        with _opened(path) as table:
            keys = {name: key for name, key in keys.items() if key in table.names}
            end = table.rows if stop is None else min(stop, table.rows)
            for first, batch in table.batches([source.text_field, *keys.values()], start, end):
                rows = Rows()
                columns = {name: batch.column(key).to_pylist() for name, key in keys.items()}
                for number, text in enumerate(_texts(batch.column(source.text_field))):
                    if isinstance(text, str):
                        rows.add(first + number, text, None, {name: column[number] for name, column in columns.items()})
                    elif isinstance(text, UnicodeDecodeError):
                        rows.add(first + number, None, f"not UTF-8 ({text.reason})")
                    else:
                        rows.add(first + number, None, not_a_string(source.text_field, text))
                yield rows


class _Table:
    """An open file: its rows, and pieces of them."""

    def __init__(self, path: str) -> None:
        self._parquet: Any = None
        if path.lower().endswith(".arrow"):
            self._batches = arrow_batches(pa, path)
            self.names = list(self._batches[0].schema.names) if self._batches else []
            self._parts = [batch.num_rows for batch in self._batches]
        else:
            self._parquet = pq.ParquetFile(path, memory_map=True)
            self.names = list(self._parquet.schema_arrow.names)
            groups = range(self._parquet.num_row_groups)
            self._parts = [self._parquet.metadata.row_group(number).num_rows for number in groups]
        self.rows = sum(self._parts)

    def batches(self, names: list[str], start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(number of the first row, rows) of pieces of the rows [start, stop)."""
        first = 0
        for part, rows in enumerate(self._parts):
            if first < stop and start < first + rows:
                at = first
                for batch in self._pieces(part, names):
                    low, high = max(0, start - at), min(batch.num_rows, stop - at)
                    if low < high:
                        yield at + low, batch.slice(low, high - low)
                    at += batch.num_rows
            first += rows

    def _pieces(self, part: int, names: list[str]) -> Iterator[Any]:
        if self._parquet is not None:
            yield from self._parquet.iter_batches(_ROWS, row_groups=[part], columns=list(dict.fromkeys(names)))
            return
        batch = self._batches[part]
        yield from (batch.slice(at, _ROWS) for at in range(0, batch.num_rows, _ROWS))


@contextmanager
def _opened(path: str) -> Iterator[_Table]:
    try:
        yield _Table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged, or not a table ({error})") from error


def _texts(column: Any) -> list[Any]:
    """The values; of one that is not UTF-8 the error."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        values: list[Any] = []
        for value in column:
            try:
                values.append(value.as_py())
            except UnicodeDecodeError as error:
                values.append(error)
        return values
