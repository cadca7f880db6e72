"""Why a document is in a corpus or not: the rows of the lineage, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megaforge.data.corpus.manifest import read_manifest
from megaforge.data.corpus.records import parse_id, partition_of, shown_id
from megaforge.errors import UserError

_MOST = 20


def explain_documents(corpus: str, document: str | None, url: str | None, path: str | None) -> str:
    """What is known of the documents of an id, an address or a file.

    Raises:
        UserError: no finished corpus lies there, or it never read such a document.
    """
    output = Path(corpus)
    if read_manifest(output) is None:
        raise UserError(f"{corpus}: no finished corpus (corpus.json) lies there")
    try:
        rows = list(_rows(output, document, url, path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{corpus}: its lineage is damaged ({error})") from error
    if not rows:
        flag, value = next((f, v) for f, v in (("document", document), ("url", url), ("path", path)) if v is not None)
        raise UserError(f"--{flag} {value}: the corpus {corpus} has read no such document")
    shown = [_words(row) for row in rows[:_MOST]]
    if len(rows) > _MOST:
        shown.append(f"... and {len(rows) - _MOST:,} more")
    return "\n\n".join(shown)


def _rows(output: Path, document: str | None, url: str | None, path: str | None) -> Iterator[dict[str, Any]]:
    if document is not None:
        try:
            identity = parse_id(document)
        except ValueError as error:
            raise UserError(f"--document {document}: {error}") from error
        file = output / "lineage" / f"{partition_of(identity):06d}.parquet"
        if file.is_file():
            yield from pq.read_table(file, filters=[("id", "=", identity)]).to_pylist()
        return
    wanted = ("url", "=", url) if url is not None else ("path", "=", path)
    for file in sorted((output / "lineage").glob("*.parquet")):
        yield from pq.read_table(file, filters=[wanted]).to_pylist()


def _words(row: dict[str, Any]) -> str:
    """One document in a few lines."""
    if row["dataset"] is not None:
        fate = f"kept, in the dataset {row['dataset']}"
    else:
        fate = f"dropped by {row['stage']}: {row['reason']}"
    lines = [f"{shown_id(row['id'])}: {fate}", f"  from {row['source']}: {row['path']}, at {row['place']:,}"]
    for name in ("url", "licence", "date", "domain", "language"):
        if row[name] is not None:
            lines.append(f"  {name}: {row[name]}")
    if row["quality"] is not None:
        lines.append(f"  quality: {row['quality']:.3f}")
    lines.append(f"  {row['characters']:,} characters; as read, SHA-256 {row['digest']}")
    if row["final_digest"] not in (None, row["digest"]):
        lines.append(f"  as kept, SHA-256 {row['final_digest']}")
    lines += [f"  changed by {rewrite}" for rewrite in row["rewrites"]]
    return "\n".join(lines)
