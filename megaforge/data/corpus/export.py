"""Kept documents in forms that other tools read: JSON Lines, and WebDataset tar shards with an index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaforge.data.corpus.finish import documents_path
from megaforge.data.corpus.job import Job, item_name
from megaforge.data.corpus.records import shown_id
from megaforge.data.corpus.totals import Total
from megaforge.data.corpus.work import batches, temporary, write_json
from megaforge.durable import give_name
from megaforge.errors import require

_APART = ("id", "text", "rewrites")  # of a record, beside what is known of it


def export_partition(job: Job, item: int, datasets: list[str]) -> dict[str, Any]:
    """Writes one partition's documents of the ``datasets``; returns what the index says of its shards."""
    shard, shards = job.recipe.shard, {}
    for name in datasets:
        if shard.jsonl:
            _write_lines(job, name, item)
        if shard.webdataset:
            shards[name] = _write_tar(job, name, item)
    return {"shards": shards}


def join_exports(job: Job, total: Total) -> None:
    """Joins the partitions' lines into a file a dataset, and writes the index of the tar shards."""
    items = range(len(job.partitions))
    for name in total.datasets if job.recipe.shard.jsonl else ():
        path = job.output / "jsonl" / f"{name}.jsonl.zst"
        path.parent.mkdir(exist_ok=True)
        partial = temporary(path)
        with partial.open("wb") as file:
            for part in (_lines_path(job, name, item) for item in items):
                if part.exists():
                    file.write(part.read_bytes())
        give_name(partial, path)
    if job.recipe.shard.webdataset:
        for name in total.datasets:
            results = (job.work.result("export0", item_name(item))["shards"] for item in items)
            shards = [result[name] for result in results if name in result]
            index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards}
            write_json(job.output / "webdataset" / name / "index.json", index)


def _records(job: Job, name: str, item: int) -> Iterator[dict[str, Any]]:
    for table in batches(documents_path(job, name, item)):
        yield from table.to_pylist()


def _known(record: dict[str, Any]) -> dict[str, Any]:
    """What is known of a document, its empty fields apart."""
    return {key: value for key, value in record.items() if key not in _APART and value is not None}


def _lines_path(job: Job, name: str, item: int) -> Path:
    return job.work.path / "lines" / name / f"{item_name(item)}.jsonl.zst"


def _write_lines(job: Job, name: str, item: int) -> None:
    """An object a document: its text, its id and what is known of it. Frames of Zstandard may follow each other, so
    joining partitions is joining bytes."""
    orjson = require("orjson", extra="data", purpose="shard.jsonl")
    zstandard = require("zstandard", extra="data", purpose="shard.jsonl")
    path = _lines_path(job, name, item)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    with partial.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
        for record in _records(job, name, item):
            line = {"text": record["text"], "id": shown_id(record["id"]), **_known(record)}
            stream.write(orjson.dumps(line) + b"\n")
    give_name(partial, path)


def _write_tar(job: Job, name: str, item: int) -> dict[str, Any]:
    """A sample a document, ``ID.txt`` and ``ID.json``; the tar depends on the documents alone."""
    path = job.output / "webdataset" / name / f"{item_name(item)}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, samples = temporary(path), 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in _records(job, name, item):
            key, samples = shown_id(record["id"]), samples + 1
            known = json.dumps(_known(record), ensure_ascii=False, sort_keys=True).encode()
            for suffix, content in (("txt", record["text"].encode()), ("json", known)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content_digest = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
    size = partial.stat().st_size
    give_name(partial, path)
    return {"url": path.name, "md5sum": content_digest, "nsamples": samples, "filesize": size}
