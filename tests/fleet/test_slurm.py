"""Models as jobs, by submitit's own processes in place of SLURM's."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megaforge.fleet.slurm import SlurmJob, submit
from megaforge.fleet.supervisor import Supervisor
from tests.fleet.fakes import Starter, manager, write_fleet

# Waits until it is asked to end, where it is given a word.
LINE = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
LINE += "print('begun', flush=True); time.sleep(600 * (len(sys.argv) > 1)); sys.exit(7)"


def test_a_job_ends_by_itself_or_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(write_fleet(tmp_path).settings, launcher="submitit-local", slurm_minutes=10)
    monkeypatch.setenv("PYTHONPATH", "")
    jobs = []
    for name, words in (("a", ()), ("b", ("wait",))):
        (tmp_path / name).mkdir()
        line, log = [sys.executable, "-c", LINE, *words], tmp_path / name / "console.log"
        jobs.append(submit(settings, line, tmp_path / name, log, os.environ, 1))
    while not (tmp_path / "b/console.log").exists() or "begun" not in (tmp_path / "b/console.log").read_text():
        assert jobs[1].poll() is None
        time.sleep(0.05)
    jobs[1].ask_to_end()
    deadline = time.monotonic() + 300
    while None in (status := [job.poll() for job in jobs]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status == [7, 0] and isinstance(jobs[0], SlurmJob) and jobs[0].peak_memory() > 1e6
    assert (tmp_path / "a/console.log").read_text() == "begun\n"


def test_jobs_whose_time_is_over_go_on_and_others_stay_stopped(tmp_path: Path) -> None:
    """A model leaves with 0 before it is complete: it got on in its first attempt, and not in its second."""
    fleet = write_fleet(tmp_path, "mode: parallel\nlauncher: submitit-local\n", "ab")
    starter = Starter()
    supervisor = Supervisor(fleet, manager(1), starter)
    reached = iter([5, 5])

    def start(model: object, threads: int) -> object:
        job = starter(model, threads)  # type: ignore[arg-type]
        if job.model.name == "a":
            job.asked = True  # ends with 0, unmarked
            job.model.run.marks.append((1.0, next(reached)))
        return job

    supervisor._starter = start  # type: ignore[assignment]
    assert supervisor.run() == 3
    assert starter.counts() == {"a": 2, "b": 1} and supervisor._allowed == 3  # whatever this machine has
    assert [str(model.state) for model in supervisor.models] == ["stopped", "completed"]
