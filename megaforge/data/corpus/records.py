"""A batch of documents as every stage of the corpus pipeline sees it: a ``pyarrow.Table`` with always the same columns.

| column | type | what it holds |
|---|---|---|
| id | int64 | partition << 32 | row in the partition: unique, ascending, the same at any number of workers |
| text | large_string | the document |
| source, path | string | the source's name; the file, as it is shown |
| place | int64 | where the document begins in the file: the byte of its line, or its row; 0 of a whole file |
| url, licence, date | string or null | fields of the record, or of its source |
| domain | string | what the source is said to be: web, books, code ... |
| kind | string | what ``text`` holds now: text, html or code |
| language | string or null | set by the stage that tells languages |
| quality | float32 or null | in [0, 1], set by the stage that scores it |
| digest | string | SHA-256 (hex) of the text as it was read |
| rewrites | list of string | what stages changed, ``stage: what`` each |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("text", pa.large_string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("place", pa.int64()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("date", pa.string()),
        ("domain", pa.string()),
        ("kind", pa.string()),
        ("language", pa.string()),
        ("quality", pa.float32()),
        ("digest", pa.string()),
        ("rewrites", pa.list_(pa.string())),
    ]
)
TEXT, HTML, CODE = "text", "html", "code"
_ROW_BITS = 32
_DEFAULTS: dict[str, Any] = {"source": "test", "path": "test.jsonl", "domain": "text", "kind": TEXT}


def make_records(texts: Sequence[str] | Sequence[bytes], **columns: Sequence[Any] | Any) -> Any:
    """Records of ``texts`` (UTF-8 where they are bytes); a column that is not given has its default or is null, one
    value stands for every row."""
    rows = len(texts)
    given: dict[str, Any] = {**_DEFAULTS, "id": range(rows), "place": range(rows), **columns}
    given["text"] = texts
    if "digest" not in given:
        contents = (text.encode() if isinstance(text, str) else text for text in texts)
        given["digest"] = [hashlib.sha256(content).hexdigest() for content in contents]
    given.setdefault("rewrites", [[] for _ in texts])
    arrays = []
    for field in SCHEMA:
        value = given.get(field.name)
        if value is None or isinstance(value, (str, int, float)):
            value = [value] * rows
        arrays.append(pa.array(list(value), field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def replaced(records: Any, **columns: Any) -> Any:
    """The records with the named columns replaced by arrays or sequences."""
    for name, values in columns.items():
        number = SCHEMA.get_field_index(name)
        field = SCHEMA.field(number)
        array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, field.type)
        records = records.set_column(number, field, array if array.type == field.type else array.cast(field.type))
    return records


def row_id(partition: int, row: int) -> int:
    """The id of a document."""
    return partition << _ROW_BITS | row


def partition_of(identity: int) -> int:
    """The partition that a document belongs to."""
    return identity >> _ROW_BITS


def shown_id(identity: int) -> str:
    """An id as people see it: ``12-345``."""
    return f"{partition_of(identity)}-{identity & (1 << _ROW_BITS) - 1}"


def parse_id(text: str) -> int:
    """The id that :func:`shown_id` shows.

    Raises:
        ValueError: it is not of this form.
    """
    partition, dash, row = text.partition("-")
    if not (dash and partition.isascii() and partition.isdigit() and row.isascii() and row.isdigit()):
        raise ValueError("expected PARTITION-ROW, such as 12-345")
    return row_id(int(partition), int(row))
