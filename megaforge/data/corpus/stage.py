"""What a stage of the corpus pipeline is: a pure function from a batch of records to records and reasons for drops.

A :class:`RowStage` looks at each document alone. A :class:`JoinStage` compares documents of the whole corpus, in memory
that one bucket needs: every partition is sketched, the sketches are dealt into buckets by a key, each bucket is joined
on its own, one task decides, and every partition applies the decisions that are its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from megaforge.data.corpus.records import SCHEMA

DECISION = pa.schema([pa.field("id", pa.int64(), nullable=False), ("reason", pa.string())])


@dataclass(frozen=True)
class Scope:
    """What a stage may know beside its own settings.

    Attributes:
        directory: where relative names of files in the settings start: that of ``corpus.yaml``.
        model_scale: the size of the model that the corpus is for, such as ``1b``.
    """

    directory: Path
    model_scale: str | None = None

    def file(self, name: str) -> Path:
        """The path of a file that the settings name."""
        return self.directory / name


@dataclass(frozen=True)
class Outcome:
    """What a stage made of a batch.

    Attributes:
        records: the same rows in the same order.
        reasons: a reason a row, None of one that is kept; None altogether: all are. A fixed phrase, with details in
            brackets: ``too short (37 characters)``. Those with the same words before the bracket are counted together.
        rewrites: what was changed, a row; None of one that was not.
        counts: numbers to sum over the corpus for the report, by what they count.
    """

    records: Any
    reasons: Sequence[str | None] | None = None
    rewrites: Sequence[str | None] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


class RowStage(ABC):
    """A stage that looks at each document alone."""

    @abstractmethod
    def apply(self, records: Any) -> Outcome:
        """What becomes of ``records`` (at least one row, :data:`SCHEMA`). Pure: the same batch, the same outcome."""


class JoinStage(ABC):
    """A stage that compares documents of the whole corpus.

    Attributes:
        buckets: how many pieces the keys are dealt into: a setting, never a function of the workers.
    """

    buckets: int = 16

    @abstractmethod
    def sketch(self, records: Any) -> Any:
        """A table with a column ``key`` (uint64) and whatever ``join`` needs; any number of rows a document. Rows of
        equal keys meet in one bucket."""

    @abstractmethod
    def join(self, sketches: Any) -> Any:
        """A table of what one bucket tells, from all of its sketches in order of the partitions."""

    def decide(self, joined: Sequence[Any]) -> Any:
        """The decisions, from what all buckets tell: a table with a column ``id`` and what ``apply`` needs."""
        return pa.concat_tables(joined)

    def apply(self, records: Any, decisions: Any) -> Outcome:
        """What becomes of ``records``, given their own decisions in the order of their ids: those with one are dropped
        for the (first) ``reason`` that it names."""
        reasons: dict[int, str] = {}
        for identity, reason in zip(decisions["id"].to_pylist(), decisions["reason"].to_pylist(), strict=True):
            reasons.setdefault(identity, reason)
        return Outcome(records, [reasons.get(identity) for identity in records["id"].to_pylist()])


Stage = RowStage | JoinStage


class StageSettings(ABC):
    """The base of a stage's settings, a frozen dataclass whose fields are :func:`megaforge.config.fields.flag`."""

    def validate(self) -> None:  # noqa: B027  most have no rules between fields
        """Raises UserError where fields do not fit each other."""

    def inputs(self, scope: Scope) -> Sequence[Path]:
        """The files beside the corpus that the stage reads: with another content of theirs, it is another recipe."""
        return ()

    @abstractmethod
    def open(self, scope: Scope) -> Stage:
        """The stage, ready to work: in every worker once, and once before the run begins, so that a missing file or
        package is told before work is lost.

        Raises:
            UserError: what it needs is missing.
        """


def deal(sketches: Any, buckets: int) -> list[Any]:
    """The sketches of each bucket, in their order."""
    import numpy as np

    keys = sketches["key"].to_numpy().astype(np.uint64, copy=False)
    owner = (keys % np.uint64(buckets)).astype(np.int64)
    order = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[order], np.arange(buckets + 1))
    dealt = sketches.take(order)
    return [dealt.slice(start, end - start) for start, end in zip(ends, ends[1:], strict=False)]


def own_decisions(decisions: Any, records: Any) -> Any:
    """The rows of ``decisions`` (ascending by id) that are of one of ``records`` (ascending by id)."""
    import numpy as np

    ids, wanted = decisions["id"].to_numpy(), records["id"].to_numpy()
    return decisions.take(np.flatnonzero(np.isin(ids, wanted)))


def by_id(decisions: Any) -> Any:
    """The decisions in ascending order of their ids, those of one id in the order they were made."""
    import numpy as np

    return decisions.take(np.argsort(decisions["id"].to_numpy(), kind="stable"))


def join_all(stage: JoinStage, partitions: Sequence[Any]) -> list[Outcome]:
    """A join stage on a few tables in memory, an outcome each: what the pipeline does, without its files."""
    dealt = [deal(stage.sketch(records), stage.buckets) for records in partitions]
    joined = [stage.join(pa.concat_tables(bucket)) for bucket in zip(*dealt, strict=True)]
    decisions = by_id(stage.decide(joined))
    return [stage.apply(records, own_decisions(decisions, records)) for records in partitions]


def check_outcome(outcome: Outcome, rows: int, stage: str) -> None:
    """Refuses an outcome that breaks the contract, which only a mistake in the stage's code can give.

    Raises:
        AssertionError: rows were added, lost, or have other columns.
    """
    kept = outcome.records
    assert kept.num_rows == rows, f"stage {stage}: {rows} rows in, {kept.num_rows} out"
    assert kept.schema.equals(SCHEMA), f"stage {stage}: other columns: {kept.schema}"
    for name in ("reasons", "rewrites"):
        values = getattr(outcome, name)
        assert values is None or len(values) == rows, f"stage {stage}: {len(values or ())} {name} for {rows} rows"
