"""JSON Lines, also .gz and .zst: an object a line. A place is a byte of the (decompressed) content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate

from megaforge.data.corpus.readers.reader import Reader, Rows
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.jsonl import LineReader, is_compressed
from megaforge.data.text.formats import text_format
from megaforge.data.text.readers import not_a_string
from megaforge.errors import require

_WORTH_CUTTING = 16 << 20  # bytes of a compressed file


class JsonLines(Reader):
    """Objects with the text under ``text_field``."""

    suffixes = (".jsonl", ".ndjson", ".json")
    whole = False
    unit = "line"

    def places(self, path: str, source: SourceSettings) -> int:
        """See :class:`Reader`: bytes, of a compressed file as far as can be told from its beginning."""
        text_format(path)  # refuses what cannot be lines, such as one JSON array
        size = os.path.getsize(path)
        if not is_compressed(path):
            return size
        if size < _WORTH_CUTTING:
            return 0
        with LineReader(path) as reader:
            return reader.expected_size()

    def read(self, path: str, source: SourceSettings, start: int, stop: int | None) -> Iterator[Rows]:
        """See :class:`Reader`."""
        loads = require("orjson", extra="data", purpose="reading JSONL").loads
        keys = {"url": source.url_field, "licence": source.licence_field, "date": source.date_field}
        with LineReader(path) as reader:
            reader.goto(start)
            for lines in reader.chunks(stop):
                sizes = [len(line) for line in lines]
                rows, place = Rows(), reader.position - sum(sizes)
                for line, at in zip(lines, accumulate(sizes[:-1], initial=place), strict=True):
                    if line.isspace():
                        continue
                    try:
                        record = loads(line)
                    except ValueError as error:
                        rows.add(at, None, f"not valid JSON ({error})")
                        continue
                    if not isinstance(record, dict):
                        rows.add(at, None, "the line is JSON but not an object")
                        continue
                    text = record.get(source.text_field)
                    if isinstance(text, str):
                        rows.add(at, text, None, {name: record.get(key) for name, key in keys.items()})
                    elif source.text_field not in record:
                        rows.add(at, None, f"the record has no key {source.text_field!r} (text_field)")
                    else:
                        rows.add(at, None, not_a_string(source.text_field, text))
                yield rows

    def line(self, path: str, place: int) -> str:
        """See :class:`Reader`; counts the lines before the place."""
        with LineReader(path) as reader:
            return f", line {reader.count_lines(place) + 1}"
