"""Documents in the rows of a table: Parquet files, and the Arrow files that Hugging Face's ``datasets`` keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megaforge.data.text.formats import TextFormat
from megaforge.data.text.readers import Chunk, TextReader, not_a_string
from megaforge.errors import UserError, require

_ROWS = 1024  # of a chunk


class TableReader(TextReader):
    """The strings of column ``key``; places are rows."""

    unit = "row"

    def __init__(self, path: str, key: str, form: TextFormat) -> None:
        super().__init__(path, key)
        arrow = require("pyarrow", extra="parquet", purpose=f"--input {path}")
        self._errors = (arrow.ArrowException, OSError)
        self._position = 0
        try:
            if form is TextFormat.PARQUET:
                parquet = require("pyarrow.parquet", extra="parquet", purpose=f"--input {path}")
                self._file = parquet.ParquetFile(path, memory_map=True)
                self._parts = [self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)]
                schema = self._file.schema_arrow
            else:
                self._file = arrow_batches(arrow, path)
                self._parts = [batch.num_rows for batch in self._file]
                schema = self._file[0].schema if self._file else None
        except self._errors as error:
            raise UserError(f"--input {path}: damaged, or not {form.value} ({error})") from error
        self.rows = sum(self._parts)
        if schema is not None:
            self._check_column(arrow, schema)

    def goto(self, start: int) -> None:
        """See :class:`TextReader`."""
        self._position = min(start, self.rows)

    def chunks(self, stop: int | None) -> Iterator[Chunk]:
        """See :class:`TextReader`."""
        end = self.rows if stop is None else min(stop, self.rows)
        first = 0
        for number, rows in enumerate(self._parts):
            if first < end and self._position < first + rows:
                for at, column in self._columns(number, first):
                    low, high = max(0, self._position - at), min(len(column), end - at)
                    if low < high:
                        self._position = at + high
                        yield self._chunk(column.slice(low, high - low))
            first += rows

    def at_end(self) -> bool:
        """See :class:`TextReader`."""
        return self._position >= self.rows

    def count_records(self, stop: int) -> int:
        """See :class:`TextReader`."""
        return min(stop, self.rows)

    def close(self) -> None:
        """Closes the file."""
        if not isinstance(self._file, list):
            self._file.close()

    def _columns(self, part: int, first: int) -> Iterator[tuple[int, Any]]:
        """(number of its first row, the column) of pieces of one part of the file."""
        try:
            if isinstance(self._file, list):
                column = self._file[part].column(self.key)
                yield from ((first + at, column.slice(at, _ROWS)) for at in range(0, len(column), _ROWS))
                return
            for batch in self._file.iter_batches(_ROWS, row_groups=[part], columns=[self.key]):
                yield first, batch.column(0)
                first += batch.num_rows
        except self._errors as error:
            raise UserError(f"--input {self.path}: damaged after row {self._position} ({error})") from error

    def _chunk(self, column: Any) -> Chunk:
        chunk = Chunk(records=len(column))
        for number, value in enumerate(column):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                chunk.bad.append((number, f"no UTF-8 ({error})"))
                continue
            if isinstance(text, str):
                chunk.add(text)
            else:
                chunk.bad.append((number, not_a_string(self.key, text)))
        chunk.input_bytes = chunk.text_bytes
        return chunk

    def _check_column(self, arrow: Any, schema: Any) -> None:
        where = f"--input {self.path}"
        if self.key not in schema.names:
            raise UserError(f"{where}: no column {self.key!r} (--json-key); there are {', '.join(schema.names)}")
        kind = schema.field(self.key).type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not any(str(kind) == name for name in ("string", "large_string", "string_view")):
            raise UserError(f"{where}: the column {self.key!r} holds {kind}, not text; --json-key names another")


def arrow_batches(arrow: Any, path: str) -> list[Any]:
    """The record batches of an Arrow file or stream (``datasets`` writes streams), mapped into memory."""
    source = arrow.memory_map(path)
    try:
        opened = arrow.ipc.open_file(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        return list(arrow.ipc.open_stream(source))
    return [opened.get_batch(number) for number in range(opened.num_record_batches)]
