"""``tools/plan.py ladders``: dry runs of the jobs of ``run_scripts/slurm/cdrmix.txt``, at their own flags and ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.errors import UserError
from megaforge.planning.gpus import gpu_named
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_request import Job, parse_ladders
from megaforge.planning.report import gigabytes
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.table import table
from megaforge.verification.dry_run import try_ranks


@dataclass(frozen=True)
class Tried:
    """A job's dry run: the bytes of its fullest rank, as built (``fullest``) and as planned."""

    layout: PlannedLayout
    shapes: int
    fullest: float
    planned: float
    seconds: float


def try_job(job: Job) -> Tried:
    """Dry-runs all ranks of a job.

    Raises:
        UserError: it would not start.
    """
    started = time.perf_counter()
    config = job.config
    layout, ranks = try_ranks(config, job.gpus)
    seconds = time.perf_counter() - started
    parts = model_parts(config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    planned = max(rank_memory(parts, layout, stages, rank).total for rank in range(layout.pp))
    return Tried(layout, len(ranks), max(rank.total for rank in ranks), planned, seconds)


def run(arguments: Sequence[str], prog: str = "plan.py ladders") -> None:
    """Tries every job with all of its ranks and prints the fullest rank and the seconds of each.

    Raises:
        UserError: a job would not start, or its fullest rank needs more than ``--share`` of the memory.
    """
    own = parse_ladders(arguments, prog)
    gpu = gpu_named(own.gpu)
    rows = [("job", "ranks", "shapes", "GB", "planned GB", f"of {gpu.memory / 1e9:g} GB", "seconds")]
    too_large = []
    for job in own.jobs:
        tried = try_job(job)
        if tried.fullest > own.share * gpu.memory:
            too_large.append(job.name)
        sizes = (gigabytes(tried.fullest), gigabytes(tried.planned), f"{tried.fullest / gpu.memory:.0%}")
        rows.append((job.name, f"{job.gpus}", f"{tried.shapes}", *sizes, f"{tried.seconds:.1f}"))
        layout = tried.layout
        print(f"{job.name}: {layout.describe()} (dp {layout.dp}): {sizes[0]} GB, {tried.seconds:.1f} s", flush=True)
    print("\n" + table(rows))
    if too_large:
        raise UserError(f"{', '.join(too_large)}: more than {own.share:.0%} of {gpu.memory / 1e9:g} GB")
