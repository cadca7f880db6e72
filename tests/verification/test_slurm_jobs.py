"""Every job of the SLURM table would start, and fits its GPUs. ``python tools/plan.py ladders`` builds all of
them; here the planner looks at all, and the smallest are built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megaforge.config.yaml_files import preset_names
from megaforge.errors import UserError
from megaforge.models.prepared_run import check_run
from megaforge.planning.gpus import GPUS
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.plan_request import read_jobs
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.verification.dry_run import try_ranks
from megaforge.verification.slurm_jobs import run

JOBS = read_jobs(Path(__file__).parents[2] / "run_scripts" / "slurm" / "cdrmix.txt")
VARIANTS = [f"cdrmix-{stage}-{size}" for size in ("1b", "4b", "40b", "200b") for stage in ("core", "reason")]
VARIANTS.append("moe-5b")
LIMIT = 0.9 * GPUS["h100-80g"].memory


def test_every_variant_has_a_job_and_a_preset() -> None:
    assert set(JOBS) == set(VARIANTS)
    assert set(VARIANTS) <= set(preset_names())


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_is_valid_and_fits_in_90_percent_of_80_gb(name: str) -> None:
    job = JOBS[name]
    config = job.config
    assert config.name == name
    assert check_run(config, job.gpus).plan.num_stages >= 1
    layout = planned_layout(config, job.gpus)
    parts = model_parts(config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    for rank in range(layout.pp):
        memory = rank_memory(parts, layout, stages, rank)
        assert memory.total <= LIMIT, f"rank {rank}: {memory.total / 1e9:.1f} GB"


@pytest.mark.parametrize("name", ["cdrmix-core-1b", "cdrmix-reason-1b"])
def test_the_smallest_are_built_and_hold_what_was_planned(name: str) -> None:
    job = JOBS[name]
    layout, ranks = try_ranks(job.config, job.gpus)
    parts = model_parts(job.config.model, layout.dtype)
    (planned,) = (rank_memory(parts, layout, cut_stages(parts, layout), rank) for rank in range(layout.pp))
    (tried,) = ranks
    assert tried.total <= LIMIT
    assert planned.total == pytest.approx(tried.total, rel=0.03)


@pytest.mark.parametrize("name", ["cdrmix-core-40b", "cdrmix-reason-200b"])
def test_one_rank_of_a_large_one_is_built(name: str) -> None:
    """A rank between the ends of the pipeline."""
    job = JOBS[name]
    config = job.config
    middle = job.gpus // config.parallel.pipeline_model_parallel_size + 1
    one = dataclasses.replace(config, dry_run=dataclasses.replace(config.dry_run, dry_run_ranks=str(middle)))
    layout, (tried,) = try_ranks(one, job.gpus)
    parts = model_parts(config.model, layout.dtype)
    planned = rank_memory(parts, layout, cut_stages(parts, layout), 1)
    assert tried.rank == middle and tried.stages == planned.stages
    assert tried.planned_activations == pytest.approx(tried.activations, rel=0.03)
    assert planned.total == pytest.approx(tried.total, rel=0.03)
    assert tried.total <= LIMIT


def test_broken_jobs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "jobs.txt"
    table.write_text("# preset, servers, flags\n\ncdrmix-test  1  --vocab-size 500 --zero 1\n")
    run(["--table", str(table)])
    assert "cdrmix-test: --tp 1 --zero 1 --micro-batch-size 2 (dp 8)" in capsys.readouterr().out
    with pytest.raises(UserError, match="cdrmix-test: more than 1% of 80 GB"):
        run(["cdrmix-test", "--table", str(table), "--share", "0.01"])
    table.write_text("cdrmix-test 1 --tp 3\n")
    with pytest.raises(UserError, match="--tp 3 does not divide"):
        run(["--table", str(table)])
    with pytest.raises(UserError, match="cdrmix-9b: there is no such job; --table .*jobs.txt has cdrmix-test"):
        run(["cdrmix-9b", "--table", str(table)])
    for line in ("cdrmix-test", "cdrmix-test --zero 1"):
        table.write_text(f"# a comment\n{line}\n")
        with pytest.raises(UserError, match=f"jobs.txt: line 2 is not a preset, a number of servers and flags: {line}"):
            run(["--table", str(table)])
