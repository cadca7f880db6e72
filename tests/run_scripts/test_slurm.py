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
    return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)


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


def run_job(tmp_path: Path, status: int, **variables: str) -> tuple[int, list[str], str]:
    """Runs pretrain.sbatch as SLURM would, with commands that print their words; (status, srun's words, the rest)."""
    scripts, tools = tmp_path / "run_scripts", tmp_path / "tools"
    if not tools.exists():
        (scripts / "slurm").mkdir(parents=True)
        tools.mkdir()
        (scripts / "slurm" / "again.sh").symlink_to(FOLDER / "again.sh")
        (scripts / "environment.sh").write_text('use_environment() { :; }\nfail() { echo "error: $*" >&2; exit 1; }\n')
        for name, does in (
            ("srun", 'printf "%s\\n" "$@" "END=$SLURM_JOB_END_TIME" >srun.words; echo said >&2; exit "$STATUS"'),
            ("scontrol", 'case "$1" in show) echo node7; echo node8 ;; *) echo "scontrol $*" ;; esac'),
            ("squeue", "echo 2026-11-26T20:00:00"),
        ):
            (tools / name).write_text(f"#!/bin/sh\n{does}\n")
            (tools / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "STATUS": str(status), "TZ": "UTC"}
    line = [bash, str(SCRIPT), "--save", "run dir", "--tp", "2"]
    done = subprocess.run(line, capture_output=True, text=True, env=env | job | variables, timeout=300)
    words = tmp_path / "srun.words"
    return done.returncode, words.read_text().splitlines() if words.exists() else [], done.stdout + done.stderr


def test_a_job_starts_torchrun_or_the_ranks_and_is_requeued(tmp_path: Path) -> None:
    (tmp_path / "run dir").mkdir()
    status, words, told = run_job(tmp_path, 1, SLURM_GPUS_ON_NODE="4")
    assert status == 85 and "said" in told and "scontrol requeue 7" in told, told
    start = words.index("torch.distributed.run")
    assert words[start + 1 : start + 7] == ["--nnodes", "2", "--nproc-per-node", "4", "--max-restarts", "3"]
    assert words[-6:-1] == ["pretrain_cdrmix.py", "--save", "run dir", "--tp", "2"] and words[-1] == "END=1795723200"
    assert (tmp_path / "run dir" / "faults.txt").read_text().split()[1:] == ["7", "0", "1", "-", "-"]
    status, words, told = run_job(tmp_path, 85, LAUNCHER="srun", RANKS_PER_NODE="2", SLURM_JOB_END_TIME="9")
    assert status == 85 and "scontrol requeue 7" in told and words[-1] == "END=9"
    assert words[1:7] == ["--ntasks", "4", "--ntasks-per-node", "2", "--cpus-per-task", "4"]
    assert words[-8:-1] == ["pretrain_cdrmix.py", "--requeue-exit-code", "85", "--save", "run dir", "--tp", "2"]
    status, words, told = run_job(tmp_path, 0)
    assert status == 0 and "requeue" not in told, "a run that has left no mark"
    assert run_job(tmp_path, 0, LAUNCHER="mpirun")[0] == 1
