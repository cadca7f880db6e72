"""From sources to a published corpus: plan, map the tasks of every phase, tokenise, describe."""

from __future__ import annotations

import functools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megaforge.data.corpus import sources
from megaforge.data.corpus.datasets import check_tokenizer, make_datasets
from megaforge.data.corpus.engines.engine import Engine
from megaforge.data.corpus.export import join_exports
from megaforge.data.corpus.job import Job, Phase, Segment, item_name, read_job, segments_of
from megaforge.data.corpus.manifest import describe, manifest_path, publish_manifest, read_manifest
from megaforge.data.corpus.native import notice
from megaforge.data.corpus.progress import Progress
from megaforge.data.corpus.recipe import Recipe, read_recipe
from megaforge.data.corpus.report import write_report
from megaforge.data.corpus.report_data import gather
from megaforge.data.corpus.totals import total_of
from megaforge.data.corpus.work import Work, write_json
from megaforge.data.left_out import LeftOut
from megaforge.data.preprocess.only_run import only_run
from megaforge.data.preprocess.pool import single_threaded
from megaforge.data.preprocess.ranks import together
from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.registry import CORPUS_ENGINES

_FORMAT, _VERSION = "megaforge-corpus", 2
# What a run writes beside its work directory.
OUTPUTS = (
    "corpus.json",
    "report.md",
    "report.html",
    "pictures",
    "datasets",
    "lineage",
    "jsonl",
    "webdataset",
    "files.skipped.tsv",
)


@dataclass(frozen=True)
class CorpusSettings:
    """The flags of ``tools/prepare_corpus.py``."""

    config: str
    output: str
    workers: int = 1
    engine: str = "local"
    on_error: str = "fail"
    keep_work: bool = False
    force: bool = False


def prepare_corpus(settings: CorpusSettings) -> None:
    """Makes the corpus that ``settings.config`` describes; a corpus that stands there already is left as it is.

    What a killed run finished is kept. The result depends on the sources and the recipe alone.

    Raises:
        UserError: on every rank, when any rank met a mistake.
    """
    single_threaded()
    pa.set_cpu_count(1)
    kind = CORPUS_ENGINES.get(settings.engine)
    recipe = read_recipe(Path(settings.config))
    output = Path(settings.output).absolute()
    engine: Engine = kind(settings.workers, output)
    try:
        segments = segments_of(recipe)
        check_tokenizer(recipe)
        with only_run(output, output / "work", engine.group, "--output") as held:
            if any(together(engine.group, lambda: _plan(settings, recipe, output, held, engine))):
                _run(output, segments, engine, settings)
    finally:
        engine.close()


def _plan(settings: CorpusSettings, recipe: Recipe, output: Path, held: str | None, engine: Engine) -> bool:
    """The leader: writes the plan; False where there is nothing to do."""
    if engine.group.rank:
        return False
    if held is not None:
        raise UserError(held)
    left_out = LeftOut()
    units = sources.find_units(recipe, left_out, settings.on_error)
    partitions = sources.cut(units, int(recipe.run.partition_mb * (1 << 20)))
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "recipe": recipe.described(),
        "on_error": settings.on_error,
        **sources.plan_of(units, partitions),
    }
    identity = digest_of(content)
    standing = read_manifest(output)
    if standing is not None and not settings.force:
        if standing.get("plan") == identity:
            print(f"{output}: already made from these sources by this recipe (--force remakes it)", file=sys.stderr)
            if not settings.keep_work:
                Work(output / "work").clear()
            return False
        raise UserError(
            f"--output {settings.output}: holds a corpus of other sources or another recipe; choose another directory, "
            "or pass --force to replace it"
        )
    work = Work(output / "work")
    plan = {**content, "plan": identity, "label": recipe.label, "directory": str(recipe.scope.directory)}
    _prepare_work(work, plan, Path(settings.config))
    if standing is not None:
        manifest_path(output).unlink()
    left_out.write(str(output / "files"))
    for line in [*left_out.summary(), *notice(), *sources.whole_files(units)]:
        print(line, file=sys.stderr)
    print(f"{len(units):,} files in {len(partitions):,} partitions", file=sys.stderr)
    return True


def _prepare_work(work: Work, plan: dict[str, Any], config: Path) -> None:
    """Makes the work directory ready for this plan; what a run of another plan left is removed."""
    before: dict[str, Any] | None
    try:
        before = parse_json((work.path / "plan.json").read_bytes())
    except (OSError, ValueError):
        before = None
    if before is not None and before.get("plan") == plan["plan"]:
        print(f"{work.path}: continuing a run that was not finished", file=sys.stderr)
        return
    if before is not None:
        print(f"{work.path}: sources or recipe have changed since; starting anew", file=sys.stderr)
    work.clear()
    for name in OUTPUTS:
        path = work.path.parent / name
        if path.is_dir():
            shutil.rmtree(path)
        elif name != "files.skipped.tsv":
            path.unlink(missing_ok=True)
    shutil.copyfile(config, work.path / "recipe.yaml")
    write_json(work.path / "plan.json", plan)


def _run(output: Path, segments: tuple[Segment, ...], engine: Engine, settings: CorpusSettings) -> None:
    job = read_job(output, segments)
    (output / "lineage").mkdir(exist_ok=True)
    for phase in job.phases():
        together(engine.group, functools.partial(_map, job, engine, phase))
        for name, table in phase.frees if engine.group.rank == 0 else ():
            job.work.remove(name, table)
    total = total_of(job)
    total.check_kept(job)
    make_datasets(job, total, settings.workers)

    def publish() -> None:
        if engine.group.rank:
            return
        join_exports(job, total)
        manifest = describe(job, total)
        write_report(output, manifest, gather(output / "lineage", job.work.path / "pairs"))
        publish_manifest(job, manifest)
        print(f"{output}: corpus {manifest['digest'][:16]}, {manifest['tokens']:,} tokens", file=sys.stderr)
        if not settings.keep_work:
            job.work.clear()

    together(engine.group, publish)


def _map(job: Job, engine: Engine, phase: Phase) -> None:
    """Maps what is not finished of a phase."""
    finished = job.work.finished(phase.name)
    left = [item for item in phase.items if item_name(item) not in finished]
    if not left:
        return
    progress = Progress(f"{phase.name}: {phase.label}", len(phase.items), len(phase.items) - len(left))
    engine.map(job.output, phase.name, phase.task, left, progress)
    progress.finish()
