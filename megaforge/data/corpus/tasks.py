"""The tasks of a run: each is a pure function of the plan and of what earlier phases left, published whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.data.corpus.export import export_partition
from megaforge.data.corpus.finish import Finisher
from megaforge.data.corpus.job import Job, item_name, open_job
from megaforge.data.corpus.lineage import LINEAGE, lineage_rows, write_lineage
from megaforge.data.corpus.partition import read_partition
from megaforge.data.corpus.records import SCHEMA, partition_of, replaced
from megaforge.data.corpus.stage import Outcome, by_id, check_outcome, deal, own_decisions
from megaforge.data.corpus.work import TableWriter, batches, read_all, reading, writing
from megaforge.data.left_out import kind_of
from megaforge.errors import UserError

READ = "read"


@dataclass
class StageCounts:
    """What one stage did to one partition; sums over partitions make the report."""

    documents: int = 0
    bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    rewritten: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts a document that was dropped."""
        self.reasons[kind_of(reason)] = self.reasons.get(kind_of(reason), 0) + 1


def run_task(output: str, phase: str, task: str, item: int) -> None:
    """Does one task of a run; one that is finished already is left as it is.

    Raises:
        UserError: a bad record or file under ``--on-error fail``, a full disk.
    """
    job = open_job(Path(output))
    if job.work.is_finished(phase, item_name(item)):
        return
    (job.work.path / phase).mkdir(exist_ok=True)
    try:
        result = _TASKS[task](job, int(phase.lstrip("abcdefghijklmnopqrstuvwxyz")), item)
    except OSError as error:
        where = error.filename or job.work.path
        raise UserError(
            f"cannot write {where}: {error.strerror or error}; what is finished is kept: make room and run the same "
            "command again"
        ) from error
    job.work.finish(phase, item_name(item), result)


class _Partition:
    """A partition on its way through one segment."""

    def __init__(self, job: Job, number: int, item: int, stack: ExitStack) -> None:
        self.job, self.number, self.item = job, number, item
        self.segment = job.segments[number]
        self.counts: dict[str, StageCounts] = {}
        work, name, phase = job.work, item_name(item), f"segment{number}"
        self._dropped = stack.enter_context(writing(work.table(phase, name, "dropped"), LINEAGE))
        self._kept: TableWriter | None = None
        self.finisher: Finisher | None = None
        self._sketches: list[Any] = []
        if self.segment.next is not None:
            self._kept = stack.enter_context(writing(work.table(phase, name, "kept"), SCHEMA))
        else:
            self.finisher = stack.enter_context(Finisher(job, item))

    def pass_on(self, records: Any, decisions: Any) -> None:
        """Takes a batch through the segment's stages."""
        if self.segment.join is not None:
            name, join = self.segment.join
            records = self.settle(name, records, join.apply(records, own_decisions(decisions, records)))
        for name, stage in self.segment.rows:
            if records.num_rows:
                records = self.settle(name, records, stage.apply(records))
        if not records.num_rows:
            return
        if self.segment.next is not None:
            assert self._kept is not None
            self._kept.write(records)
            self._sketches.append(self.segment.next[1].sketch(records))
        elif self.finisher is not None:
            self.finisher.add(records)

    def drop(self, stage: str, records: Any, reasons: list[str]) -> None:
        """Takes note of documents that are dropped."""
        self._dropped.write(lineage_rows(records, stage, reasons))
        for reason in reasons:
            self.counts[stage].drop(reason)

    def settle(self, stage: str, before: Any, outcome: Outcome) -> Any:
        """Counts what a stage did; returns the records that go on."""
        check_outcome(outcome, before.num_rows, stage)
        counts = self.counts.setdefault(stage, StageCounts())
        counts.documents += before.num_rows
        counts.bytes += text_bytes(before)
        records = outcome.records
        if outcome.rewrites is not None and any(outcome.rewrites):
            counts.rewritten += sum(rewrite is not None for rewrite in outcome.rewrites)
            records = replaced(records, rewrites=_with_rewrites(records, stage, outcome.rewrites))
        if outcome.reasons is not None:
            reasons = list(outcome.reasons)
            gone = np.array([reason is not None for reason in reasons])
            if gone.any():
                self.drop(stage, records.filter(pa.array(gone)), [reason for reason in reasons if reason is not None])
                records = records.filter(pa.array(~gone))
        counts.kept += records.num_rows
        counts.kept_bytes += text_bytes(records)
        for name, number in outcome.counts.items():
            counts.counts[name] = counts.counts.get(name, 0) + int(number)
        return records

    def end(self) -> dict[str, Any]:
        """Writes the sketches or the datasets' documents; returns what was counted."""
        if self.segment.next is not None:
            stage = self.segment.next[1]
            sketches = self._sketches or [stage.sketch(SCHEMA.empty_table())]
            path = self.job.work.table(f"segment{self.number}", item_name(self.item), "sketch")
            dealt = deal(pa.concat_tables(sketches).combine_chunks(), stage.buckets)
            with writing(path, sketches[0].schema) as writer:
                for bucket in dealt:
                    writer.write(bucket)
        return {"stages": {name: vars(counts) for name, counts in self.counts.items()}}


def _segment(job: Job, number: int, item: int) -> dict[str, Any]:
    """Takes a partition through a segment; the last one writes the documents of the datasets and the lineage."""
    with ExitStack() as stack:
        partition = _Partition(job, number, item, stack)
        digest = hashlib.sha256()
        if number == 0:
            counts = partition.counts.setdefault(READ, StageCounts())
            for records, bad, reasons in read_partition(job, item):
                size = text_bytes(records)
                counts.documents += records.num_rows + bad.num_rows
                counts.bytes += size
                counts.kept += records.num_rows
                counts.kept_bytes += size
                digest.update("".join(records["digest"].to_pylist()).encode())
                if bad.num_rows:
                    partition.drop(READ, bad, reasons)
                if records.num_rows:
                    partition.pass_on(records, None)
        else:
            decisions = _decisions(job, number - 1, item)
            for records in batches(job.work.table(f"segment{number - 1}", item_name(item), "kept")):
                partition.pass_on(records, decisions)
        result = partition.end()
        if number == 0:
            result["digest"] = digest.hexdigest()
        if partition.finisher is not None:
            result["datasets"] = partition.finisher.end()
    if partition.finisher is not None:
        tables = [
            read_all(job.work.table(f"segment{earlier}", item_name(item), "dropped")) for earlier in range(number + 1)
        ]
        write_lineage(lineage_path(job.output, item), [*tables, partition.finisher.kept()])
    return result


def lineage_path(output: Path, item: int) -> Path:
    """The lineage of a partition."""
    return output / "lineage" / f"{item_name(item)}.parquet"


def _join(job: Job, number: int, item: int) -> dict[str, Any]:
    """Joins some buckets, each of all partitions' sketches."""
    stage = _join_stage(job, number)
    groups = job.groups(stage)
    buckets = range(item * stage.buckets // groups, (item + 1) * stage.buckets // groups)
    parts: dict[int, list[Any]] = {bucket: [] for bucket in buckets}
    for partition in range(len(job.partitions)):
        with reading(job.work.table(f"segment{number}", item_name(partition), "sketch")) as opened:
            for bucket, found in parts.items():
                batch = opened.get_batch(bucket)
                if batch.num_rows or partition == 0:
                    found.append(pa.Table.from_batches([batch]))
    joined = pa.concat_tables([stage.join(pa.concat_tables(parts[bucket]).combine_chunks()) for bucket in buckets])
    with writing(job.work.table(f"join{number}", item_name(item), "joined"), joined.schema) as writer:
        writer.write(joined)
    return {"rows": joined.num_rows}


def _decide(job: Job, number: int, item: int) -> dict[str, Any]:
    """Decides from all buckets; the decisions of a partition make one batch of the file."""
    stage = _join_stage(job, number)
    joined = [read_all(job.work.table(f"join{number}", item_name(k), "joined")) for k in range(job.groups(stage))]
    decisions = by_id(stage.decide(joined)).combine_chunks()
    ids = decisions["id"].to_numpy()
    owners = [partition_of(int(identity)) for identity in ids[np.flatnonzero(np.diff(partition_of(ids), prepend=-1))]]
    starts = np.searchsorted(partition_of(ids), owners, side="left")
    with writing(job.work.table(f"decide{number}", item_name(item), "decisions"), decisions.schema) as writer:
        for start, end in pairwise([*starts, len(ids)]):
            writer.write(decisions.slice(int(start), int(end) - int(start)))
        writer.write(decisions.slice(0, 0))  # for the partitions without any
    return {"partitions": {str(owner): number for number, owner in enumerate(owners)}, "rows": len(ids)}


def _decisions(job: Job, number: int, item: int) -> Any:
    """The decisions about one partition's documents."""
    owners = job.work.result(f"decide{number}", item_name(0))["partitions"]
    with reading(job.work.table(f"decide{number}", item_name(0), "decisions")) as opened:
        return pa.Table.from_batches([opened.get_batch(owners.get(str(item), len(owners)))])


def _export(job: Job, number: int, item: int) -> dict[str, Any]:
    """Writes a partition's kept documents for other tools."""
    result = job.work.result(f"segment{len(job.segments) - 1}", item_name(item))
    return export_partition(job, item, list(result["datasets"]))


def _join_stage(job: Job, number: int) -> Any:
    following = job.segments[number].next
    assert following is not None
    return following[1]


def text_bytes(records: Any) -> int:
    """UTF-8 bytes of the texts."""
    return int(pc.sum(pc.binary_length(records["text"])).as_py() or 0)


def _with_rewrites(records: Any, stage: str, rewrites: Any) -> list[list[str]]:
    before = records["rewrites"].to_pylist()
    return [old if new is None else [*old, f"{stage}: {new}"] for old, new in zip(before, rewrites, strict=True)]


_TASKS: dict[str, Callable[[Job, int, int], dict[str, Any]]] = {
    "segment": _segment,
    "join": _join,
    "decide": _decide,
    "export": _export,
}
