"""The SLURM scripts' own steps."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from megaforge.planning.plan_request import read_jobs

FOLDER = Path(__file__).parents[2] / "run_scripts" / "slurm"
SCRIPT = FOLDER / "pretrain.sbatch"


def test_a_step_has_all_cores_of_its_task() -> None:
    """Every srun comes after the line that hands ``--cpus-per-task`` on."""
    lines = SCRIPT.read_text().splitlines()
    steps = [number for number, line in enumerate(lines) if line.split()[:1] == ["srun"]]
    handed_on = [n for n, line in enumerate(lines) if 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in line]
    assert steps and handed_on and handed_on[0] < steps[0]


def test_its_output_needs_no_directory() -> None:
    """SLURM opens the file before the script runs: where its directory is missing, the job ends without a word."""
    [output] = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    assert "/" not in output


def submit(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls cdrmix.sh with an sbatch that prints its words, one a line."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf \'%s\\n\' "$PWD" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = [bash, str(FOLDER / "cdrmix.sh"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)


def test_every_job_of_the_table_is_submitted_as_it_stands(tmp_path: Path) -> None:
    for job in read_jobs(FOLDER / "cdrmix.txt").values():
        done = submit(tmp_path, job.name, "--data-path", "a b", "--save", "x")
        assert done.returncode == 0, done.stderr
        home, name, servers, script, *arguments = done.stdout.splitlines()
        assert (name, servers) == (f"--job-name={job.name}", f"--nodes={job.gpus // 8}")
        assert Path(home, script) == SCRIPT
        assert arguments == [*job.arguments, "--data-path", "a b", "--save", "x"]


def test_a_job_that_is_not_there_is_named(tmp_path: Path) -> None:
    for arguments, named in (((), "''"), (("cdrmix-core-4",), "'cdrmix-core-4'"), (("#",), "'#'")):
        done = submit(tmp_path, *arguments)
        assert done.returncode == 2 and named in done.stderr and "cdrmix-reason-200b" in done.stderr
