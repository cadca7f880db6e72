"""The end of a preprocessing run: finished shards become one published dataset with its sidecar."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.indexed_dataset import IndexedDataset, bin_path, idx_path, merge_shards, sidecar_path
from megaforge.data.left_out import LeftOut, kind_of
from megaforge.data.preprocess.plan import Shard, Source, WorkDirectory, read_manifest, successor, write_json
from megaforge.data.preprocess.shard import WorkerSpec
from megaforge.data.sidecar import probe_tokens
from megaforge.errors import UserError


@dataclass(frozen=True)
class Job:
    """One dataset to make: what rank 0 prepares and every rank works from. ``sidecar`` is what is known beforehand."""

    output: str
    spec: WorkerSpec
    sources: list[Source]
    groups: list[list[Shard]]
    sidecar: dict[str, Any]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """The job from its JSON."""
        return cls(
            output=value["output"],
            spec=WorkerSpec.from_json(value["spec"]),
            sources=[Source(**source) for source in value["sources"]],
            groups=[[Shard.from_json(shard) for shard in group] for group in value["groups"]],
            sidecar=value["sidecar"],
        )


def publish(job: Job, hasher: SourceHasher) -> None:
    """Rank 0: joins the shards, describes the result, and removes the work directory."""
    work = WorkDirectory(Path(job.spec.work_directory))
    shards = list(_finished_shards(job, work))
    for source in job.sources:
        if Source.of(source.path, job.spec.json_key) != source:
            raise UserError(f"--input {source.path} changed while it was being read; run the command again")
    left_out = _left_out(job, shards)
    _report(left_out, job.output)
    total = {name: sum(m[name] for _, m in shards) for name in ("documents", "tokens", "text_bytes")}
    if total["tokens"] == 0:
        work.clear()
        skipped = f" ({left_out.total:,} lines were left out)" if left_out.total else ""
        raise UserError(f"--input {' '.join(job.spec.sources)}: the corpus is empty: no document has a token{skipped}")
    try:
        merge_shards([work.prefix(shard) for shard, _ in shards], job.output)
        sidecar = {
            **job.sidecar,
            "sources": [
                {"path": source.path, "bytes": source.bytes, "sha256": digest}
                for source, digest in zip(job.sources, hasher.digests(), strict=True)
            ],
            "documents": total["documents"],
            "sequences": _sequences(job.output),
            "tokens": total["tokens"],
            "text_bytes": total["text_bytes"],
            "skipped_lines": left_out.total,
            "skipped": left_out.counts,
            "bin_sha256": _sha256(bin_path(job.output)),
            "bin_probe": probe_tokens(IndexedDataset(job.output)),
            "idx_sha256": _sha256(idx_path(job.output)),
            "bin_bytes": bin_path(job.output).stat().st_size,
            "idx_bytes": idx_path(job.output).stat().st_size,
        }
        write_json(sidecar_path(job.output), sidecar)
        work.clear()
    except OSError as error:
        raise UserError(f"cannot write {job.output}: {error.strerror}; the finished shards are kept") from error
    print(
        f"{job.output}: {total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['text_bytes'] / total['tokens']:.3f} bytes of text a token",
        file=sys.stderr,
    )


def _finished_shards(job: Job, work: WorkDirectory) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Every shard with its manifest, in input order."""
    for group in job.groups:
        for shard in group:
            while True:
                manifest = read_manifest(work.manifest(shard))
                if manifest is None:
                    raise UserError(f"{work.manifest(shard)} is missing; run the command again")
                yield shard, manifest
                if not shard.open_ended or manifest["end"]:
                    break
                shard = successor(shard)


def _left_out(job: Job, shards: Sequence[tuple[Shard, dict[str, Any]]]) -> LeftOut:
    """The records without a document; a shard knows its own line numbers, those before it complete them."""
    left_out = LeftOut()
    before: dict[int, int] = {}
    for shard, manifest in shards:
        unnamed = dict(manifest["reasons"])
        for segment, line, reason in manifest["skipped"]:
            source = shard.segments[segment][0]
            left_out.add(f"{job.spec.sources[source]}, {manifest['unit']} {line + before.get(source, 0)}", reason)
            unnamed[kind_of(reason)] -= 1
        for kind, number in unnamed.items():
            left_out.count(kind, number)
        for (source, _, _), lines in zip(shard.segments, manifest["lines"], strict=True):
            before[source] = before.get(source, 0) + lines
    return left_out


def _report(left_out: LeftOut, output: str) -> None:
    """A line a reason on stderr, and the list beside the output."""
    details = left_out.write(output)
    for line in left_out.summary():
        print(line, file=sys.stderr)
    if details is not None:
        more = "" if len(left_out.entries) == left_out.total else f", {len(left_out.entries):,} of them"
        print(f"left out {left_out.total:,} in all (--on-error skip){more} listed in {details}", file=sys.stderr)


def standing_dataset(output: str, described: dict[str, Any], sources: Sequence[Source]) -> tuple[str | None, bool]:
    """What stands where the dataset will be published: (why it is not this run's to replace, or None; whether it is
    whole and what this run would make). What the same command left damaged or half published is this run's."""
    files = (bin_path(output), idx_path(output))
    if not any(os.path.lexists(path) for path in (*files, sidecar_path(output))):
        return None, False
    sidecar = read_manifest(sidecar_path(output))
    if sidecar is None or sidecar.get("format") != described["format"]:
        return "not described by a .json of this tool", False
    changed = [name for name, value in described.items() if sidecar.get(name) != value]
    if changed:
        return f"made with another choice of {', '.join(changed)}", False
    recorded = [(source["bytes"], source["sha256"]) for source in sidecar["sources"]]
    if [size for size, _ in recorded] != [source.bytes for source in sources] or recorded != [
        (source.bytes, _sha256(Path(source.path))) for source in sources
    ]:
        return "made from other text", False
    sizes = (sidecar["bin_bytes"], sidecar["idx_bytes"])
    return None, all(path.is_file() and path.stat().st_size == size for path, size in zip(files, sizes, strict=True))


def _sequences(output: str) -> int:
    """The number of sequences in the index: the u64 at byte 18."""
    with idx_path(output).open("rb") as file:
        return int.from_bytes(file.read(26)[18:], "little")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SourceHasher:
    """SHA-256 of files, in a thread beside the tokenising (hashing releases the interpreter lock)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths, self._digests = paths, [""] * len(paths)
        self._stopped = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def digests(self) -> list[str]:
        """The digests (hex), once all are known."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digests

    def stop(self) -> None:
        """Gives up soon."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for number, path in enumerate(self._paths):
                digest = hashlib.sha256()
                with open(path, "rb", buffering=0) as file:
                    while (block := file.read(1 << 20)) and not self._stopped.is_set():
                        digest.update(block)
                self._digests[number] = digest.hexdigest()
        except OSError as error:
            self._error = error
