"""What becomes of a SLURM job once its ranks have ended, with a scontrol that prints its words."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

AGAIN = Path(__file__).parents[2] / "run_scripts" / "slurm" / "again.sh"
SRUN = "srun: error: n{node}: task 3: Killed\nsrun: error: n9: tasks 0-2: Exited with exit code 1\n"
TORCHRUN = "Failures:\n  time      : 0\n  host      : n8\n  exitcode  : 1 (pid: 9)\n"
TORCHRUN += "Root Cause (first observed failure):\n  time      : {time}\n  host      : n{node}\n  rank      : 0\n"
TORCHRUN += "  exitcode  : {status} (pid: 7)\n"


def bash(tmp_path: Path, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    tools = tmp_path / "tools"
    if not tools.exists():
        tools.mkdir()
        (tools / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && printf "n%s\\n" 1 2 3 || echo "scontrol $*"\n')
        (tools / "scontrol").chmod(0o755)
    program = shutil.which("bash")
    assert program is not None
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables}
    line = f"set -euo pipefail; source {AGAIN}; {line}"
    return subprocess.run([program, "-c", line], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)


def test_the_directory_of_a_run_is_found(tmp_path: Path) -> None:
    for words, found in (("--tp 2 --save r --load r", "r"), ("--save=a/b", "a/b"), ("--save-interval 3", ""), ("", "")):
        assert bash(tmp_path, f"saved_below {words}").stdout.strip() == found


@pytest.mark.parametrize(
    ("said", "node"),
    [
        (SRUN.format(node=3), "n3"),
        (SRUN.format(node=3) + "slurmstepd: error: Node failure on n5\n", "n5"),
        (
            TORCHRUN.format(time="2026-11-26_10:00:02", node=1, status=1)
            + TORCHRUN.format(time="2026-11-26_10:00:01", node="2.site.org", status=-9)
            + SRUN.format(node=3),
            "n2",
        ),
        (
            TORCHRUN.format(time="2026-11-26_10:00:02", node=7, status=1) + SRUN.format(node=3),
            "n3",
        ),  # a host's other name
        ("a line of the run\n", ""),
    ],
)
def test_the_node_that_failed_first_is_found(tmp_path: Path, said: str, node: str) -> None:
    (tmp_path / "said").write_text(said)
    done = bash(tmp_path, "faulty_node said")
    assert (done.returncode, done.stdout.strip()) == (0, node), done.stderr


def after(tmp_path: Path, status: int, said: str = "", **variables: str) -> tuple[int, str]:
    (tmp_path / "said").write_text(said)
    (tmp_path / "run").mkdir(exist_ok=True)
    done = bash(tmp_path, f"after_ranks {status} said run", **variables)
    return done.returncode, done.stdout + done.stderr


def test_what_ended_as_it_was_asked_to_goes_on_until_nothing_is_left(tmp_path: Path) -> None:
    assert after(tmp_path, 0) == (0, ""), "a run that says nothing of what is left"
    assert after(tmp_path, 85) == (85, "scontrol requeue 7\n"), "started by srun"
    (tmp_path / "run" / "unfinished").touch()
    assert after(tmp_path, 0) == (85, "scontrol requeue 7\n"), "started by torchrun"
    status, told = after(tmp_path, 0, SLURM_RESTART_COUNT="10")
    assert status == 85 and "MAX_REQUEUES=10" in told and "scontrol" not in told
    (tmp_path / "run" / "completed").touch()
    assert after(tmp_path, 0) == after(tmp_path, 1) == (0, "")
    assert not (tmp_path / "run" / "faults.txt").exists()
    assert bash(tmp_path, "after_ranks 3 said ''").returncode == 3


def test_a_node_is_excluded_after_its_second_fault(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for attempt, node in enumerate((3, 4, 3)):
        (tmp_path / "run" / "latest").write_text(f"step_{attempt}\n")
        status, told = after(tmp_path, 137, SRUN.format(node=node), SLURM_RESTART_COUNT=str(attempt))
        assert status == 85 and f"fault on n{node}, status 137" in told
        assert ("scontrol update JobId=7 ExcNodeList=n3" in told) == (attempt == 2)
    lines = (tmp_path / "run" / "faults.txt").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["7", "0", "137", "n3", "step_0"],
        ["7", "1", "137", "n4", "step_1"],
        ["7", "2", "137", "n3", "step_2"],
    ]


def test_what_would_fail_again_is_not_requeued(tmp_path: Path) -> None:
    of_torchrun = TORCHRUN.format(time="2026-11-26_10:00:02", node=1, status=2)
    for status, said in ((2, ""), (1, of_torchrun)):
        code, told = after(tmp_path, status, said)
        assert code == 2 and "not requeued" in told and "scontrol" not in told
    for attempt in range(3):
        code, told = after(tmp_path, 1, SRUN.format(node=attempt))
        assert (code, "scontrol requeue 7" in told) == ((85, True) if attempt < 2 else (1, False))
    assert "3 attempts in a row failed after no checkpoint" in told
