"""``tools/plan.py ladders``: dry runs of the jobs that SLURM scripts describe, at their own flags and ranks."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.planning.gpus import gpu_named
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_request import parse_ladders
from megaforge.planning.report import gigabytes, table
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.verification.dry_run import try_ranks


@dataclass(frozen=True)
class Job:
    """What a SLURM script starts: ``gpus`` ranks of the training script with ``arguments``."""

    name: str
    gpus: int
    arguments: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The configuration of every rank."""
        return parse_config(self.arguments, prog=self.name).config


def read_job(script: Path) -> Job:
    """Reads ``#SBATCH --nodes=``, ``--gpus-per-node=`` and the line that starts ``pretrain.sbatch``.

    Raises:
        UserError: the script has not the form of ``run_scripts/slurm/cdrmix-*.sbatch``.
    """
    text = script.read_text()
    sizes = [re.search(rf"^#SBATCH --{key}=(\d+)$", text, re.MULTILINE) for key in ("nodes", "gpus-per-node")]
    command = re.search(r"^exec bash run_scripts/slurm/pretrain\.sbatch (.*) \"\$@\"$", text, re.MULTILINE)
    if command is None or sizes[0] is None or sizes[1] is None:
        raise UserError(f"{script}: it has no #SBATCH --nodes=N, --gpus-per-node=N and a last line like its neighbours")
    return Job(script.stem, int(sizes[0][1]) * int(sizes[1][1]), tuple(shlex.split(command[1])))


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
    for script in own.scripts:
        job = read_job(script)
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
