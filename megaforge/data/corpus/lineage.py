"""Why a document is in the corpus or not: a row a document that was read, in one Parquet file a partition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megaforge.data.corpus.columns import flat_bytes
from megaforge.data.corpus.records import SCHEMA
from megaforge.data.corpus.work import temporary
from megaforge.durable import give_name

# What a record has but its text, and what became of it. A kept document has a dataset and a final digest, a dropped one
# the stage that dropped it and its reason. characters: of the text as it was when that was decided.
LINEAGE = pa.schema(
    [
        *(field for field in SCHEMA if field.name != "text"),
        ("characters", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("dataset", pa.string()),
        ("final_digest", pa.string()),
    ]
)


def lineage_rows(
    records: Any,
    stage: str | None = None,
    reasons: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
) -> Any:
    """Rows of :data:`LINEAGE` for records that ``stage`` dropped, or that are kept in ``datasets``."""
    rows = records.num_rows
    own = {
        "characters": pc.fill_null(pc.utf8_length(records["text"]).cast(pa.int64()), 0),
        "stage": pa.array([stage] * rows, pa.string()),
        "reason": pa.array(reasons if reasons is not None else [None] * rows, pa.string()),
        "dataset": pa.array(datasets if datasets is not None else [None] * rows, pa.string()),
        "final_digest": pa.array(digests if digests is not None else [None] * rows, pa.string()),
    }
    arrays = [own[field.name] if field.name in own else records[field.name] for field in LINEAGE]
    return pa.Table.from_arrays(arrays, schema=LINEAGE)


def write_lineage(path: Path, tables: Sequence[Any]) -> None:
    """Writes the rows of one partition, in the order of their ids."""
    table = pa.concat_tables(tables).combine_chunks().sort_by("id")
    partial = temporary(path)
    try:
        pq.write_table(table, partial, compression="zstd")
        give_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def digests_of(texts: Any) -> list[str]:
    """SHA-256 (hex) of each text."""
    data, offsets = flat_bytes(texts)
    spans = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    return [hashlib.sha256(data[start:end].data).hexdigest() for start, end in spans]
