"""What every worker of a run works from: the plan on the disk, and the stages as segments between joins."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.corpus.recipe import Recipe, read_recipe
from megaforge.data.corpus.sources import Piece, Unit, read_plan
from megaforge.data.corpus.stage import JoinStage, RowStage
from megaforge.data.corpus.work import Work
from megaforge.errors import UserError
from megaforge.json_text import parse_json


@dataclass(frozen=True)
class Phase:
    """One map over items.

    Attributes:
        name: of its folder in the work directory, a word and a number.
        task: what is done to each item.
        label: what that is, in the words of the recipe.
        frees: (phase, table) of the tables that nothing reads once it is finished.
    """

    name: str
    task: str
    label: str
    items: list[int]
    frees: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Segment:
    """The stages between two joins, which a partition passes in one task.

    Attributes:
        join: (name, stage) of the join whose decisions are applied first; None in the first segment.
        rows: (name, stage) of the row stages that follow.
        next: the join that is sketched for at the end; None in the last segment.
    """

    join: tuple[str, JoinStage] | None
    rows: tuple[tuple[str, RowStage], ...]
    next: tuple[str, JoinStage] | None


@dataclass(frozen=True)
class Job:
    """A run in progress.

    Attributes:
        output: the directory of the result.
        on_error: fail or skip: what a bad record or file does.
    """

    output: Path
    recipe: Recipe
    units: list[Unit]
    partitions: list[list[Piece]]
    on_error: str
    segments: tuple[Segment, ...]

    @property
    def work(self) -> Work:
        """Its work directory."""
        return Work(self.output / "work")

    def stage_names(self) -> list[str]:
        """The stages in order, as counts and lineage name them."""
        names = []
        for segment in self.segments:
            names += [segment.join[0]] if segment.join is not None else []
            names += [name for name, _ in segment.rows]
        return names

    def groups(self, stage: JoinStage) -> int:
        """How many tasks join the buckets of a stage, some buckets each: as much is read as one partition left."""
        return min(stage.buckets, len(self.partitions))

    def phases(self) -> Iterator[Phase]:
        """Everything there is to map before the datasets are made, in order."""
        every = list(range(len(self.partitions)))
        for number, segment in enumerate(self.segments):
            before = number - 1
            if segment.join is not None:
                name, stage = segment.join
                sketches = ((f"segment{before}", "sketch"),)
                yield Phase(f"join{before}", "join", name, list(range(self.groups(stage))), sketches)
                yield Phase(f"decide{before}", "decide", name, [0], ((f"join{before}", "joined"),))
            names = [segment.join[0] if segment.join is not None else "read", *(name for name, _ in segment.rows)]
            names.append(f"sketch for {segment.next[0]}" if segment.next is not None else "finish")
            done = ((f"segment{before}", "kept"), (f"decide{before}", "decisions"))
            yield Phase(f"segment{number}", "segment", ", ".join(names), every, done if number else ())
        if self.recipe.shard.jsonl or self.recipe.shard.webdataset:
            yield Phase("export0", "export", "JSON Lines and tar shards", every)


def item_name(item: int) -> str:
    """What the files of an item's task begin with."""
    return f"{item:06d}"


def segments_of(recipe: Recipe) -> tuple[Segment, ...]:
    """Opens every stage.

    Raises:
        UserError: a stage misses a file or a package; with the stage's name.
    """
    segments: list[Segment] = []
    join: tuple[str, JoinStage] | None = None
    rows: list[tuple[str, RowStage]] = []
    seen = Counter[str]()
    for name, settings in recipe.stages:
        seen[name] += 1
        try:
            stage = settings.open(recipe.scope)
        except UserError as error:
            raise UserError(f"{recipe.label}: stages.{name}: {error}") from error
        if seen[name] > 1:
            name = f"{name} ({seen[name]})"
        if isinstance(stage, JoinStage):
            segments.append(Segment(join, tuple(rows), (name, stage)))
            join, rows = (name, stage), []
        else:
            rows.append((name, stage))
    return (*segments, Segment(join, tuple(rows), None))


def read_job(output: Path, segments: tuple[Segment, ...] | None = None) -> Job:
    """The run whose plan lies in ``output``; its stages are opened unless they are given."""
    work = Work(output / "work")
    plan: dict[str, Any] = parse_json((work.path / "plan.json").read_bytes())
    recipe = read_recipe(work.path / "recipe.yaml", plan["label"], Path(plan["directory"]))
    units, partitions = read_plan(plan)
    return Job(output, recipe, units, partitions, plan["on_error"], segments or segments_of(recipe))


@functools.lru_cache(maxsize=1)
def _opened(output: Path, plan_digest: str) -> Job:
    return read_job(output)


def open_job(output: Path) -> Job:
    """:func:`read_job`, kept from one task of a worker to the next."""
    plan = (output / "work" / "plan.json").read_bytes()
    return _opened(output, hashlib.sha256(plan).hexdigest())
