"""The end of a partition: its kept documents, dealt into the files of their datasets."""

from __future__ import annotations

import bisect
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.data.corpus.columns import flat_bytes
from megaforge.data.corpus.job import Job, item_name
from megaforge.data.corpus.lineage import LINEAGE, digests_of, lineage_rows
from megaforge.data.corpus.recipe import ShardSettings
from megaforge.data.corpus.records import SCHEMA
from megaforge.data.corpus.work import TableWriter, temporary
from megaforge.durable import give_name

_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")  # that an ISO 8601 date begins with


class Finisher:
    """Writes the kept documents of one partition, in a file a dataset; they appear when the block ends well."""

    def __init__(self, job: Job, item: int) -> None:
        self._job, self._item = job, item
        self._writers: dict[str, TableWriter] = {}
        self._counts: dict[str, dict[str, Any]] = {}
        self._rows: list[Any] = [LINEAGE.empty_table()]
        self._pairs = np.zeros(1 << 16, np.int64)

    def __enter__(self) -> Finisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            if kind is None:
                writer.close()
            else:
                writer.abandon()

    def add(self, records: Any) -> None:
        """Writes kept documents (at least one)."""
        names = self._names(records)
        self._rows.append(lineage_rows(records, datasets=names, digests=digests_of(records["text"])))
        self._count_pairs(records)
        for name in sorted(set(names)):
            own = records.filter(pa.array([other == name for other in names]))
            self._writer(name).write(own)
            self._count(name, own)

    def end(self) -> dict[str, Any]:
        """What was counted of each dataset; writes the pairs of bytes beside the documents."""
        path = pairs_path(self._job, self._item)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary(path)
        with partial.open("wb") as file:
            np.save(file, self._pairs)
        give_name(partial, path)
        return self._counts

    def kept(self) -> Any:
        """The lineage of the kept documents."""
        return pa.concat_tables(self._rows)

    def _names(self, records: Any) -> list[str]:
        """The dataset of each document."""
        shard = self._job.recipe.shard
        lengths = pc.utf8_length(records["text"]).to_pylist()
        rows = zip(
            *(records[name].to_pylist() for name in ("source", "domain", "quality")),
            lengths,
            strict=True,
        )
        return [dataset_name(shard, *row) for row in rows]

    def _writer(self, name: str) -> TableWriter:
        if name not in self._writers:
            path = documents_path(self._job, name, self._item)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writers[name] = TableWriter(path, SCHEMA)
        return self._writers[name]

    def _count(self, name: str, records: Any) -> None:
        empty = {"documents": 0, "bytes": 0, "scored": 0, "quality_millionths": 0, "languages": {}, "months": {}}
        counts = self._counts.setdefault(name, empty)
        counts["documents"] += records.num_rows
        scores = [score for score in records["quality"].to_pylist() if score is not None]
        counts["scored"] += len(scores)
        counts["quality_millionths"] += sum(round(score * 1e6) for score in scores)
        for date in records["date"].to_pylist():
            if date is not None and _MONTH.match(date):
                counts["months"][date[:7]] = counts["months"].get(date[:7], 0) + 1
        counts["bytes"] += pc.sum(pc.binary_length(records["text"])).as_py()
        for language in records["language"].to_pylist():
            counts["languages"][language or "?"] = counts["languages"].get(language or "?", 0) + 1

    def _count_pairs(self, records: Any) -> None:
        """Counts pairs of neighbouring bytes within each document."""
        content, offsets = flat_bytes(records["text"])
        pairs = content[:-1].astype(np.uint16) << 8 | content[1:]
        self._pairs += np.bincount(pairs, minlength=1 << 16)
        seams = np.unique(offsets[1:-1])
        seams = pairs[seams[(seams > 0) & (seams < len(content))] - 1]
        self._pairs -= np.bincount(seams, minlength=1 << 16)


def dataset_name(shard: ShardSettings, source: str, domain: str, quality: float | None, length: int) -> str:
    """The dataset of a document: ``SOURCE-DOMAIN-LENGTH``, and ``-QUALITY`` where quality has buckets."""
    parts = [source, domain, bucket_name(shard.length_buckets, length, "l")]
    if shard.quality_buckets:
        parts.append(bucket_name(shard.quality_buckets, quality if quality is not None else 0.0, "q"))
    return "-".join(parts)


def bucket_name(edges: tuple[int, ...] | tuple[float, ...], value: float, letter: str) -> str:
    """``l0`` below the first edge, ``l1`` from it on, and so on."""
    return f"{letter}{bisect.bisect_right(edges, value)}"


def documents_path(job: Job, dataset: str, item: int) -> Path:
    """The kept documents of one partition that belong to a dataset."""
    return job.work.path / "documents" / dataset / f"{item_name(item)}.arrow"


def pairs_path(job: Job, item: int) -> Path:
    """How often each pair of bytes stands in the kept documents of a partition: int64 [65536]."""
    return job.work.path / "pairs" / f"{item_name(item)}.npy"
