"""A model as a job of SLURM, by submitit: for fleets that outgrow one machine. The output must be on a file system that
the jobs see."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import megaforge
from megaforge.errors import require
from megaforge.fleet.recipe import FleetSettings

ASKED_FILE = ".asked_to_end"  # the supervisor's word to a job, which may be on another machine
_TICK = 0.5


def run_line(line: list[str], log: str, environment: Mapping[str, str], asked: str) -> tuple[int, float]:
    """Runs in the job: (exit status, peak resident bytes of its largest process). Passes the word in ``asked`` on."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "CUDA_VISIBLE"))}
    with open(log, "ab") as file:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**environment, **own})
    while (status := process.poll()) is None:
        if Path(asked).exists():
            with suppress(OSError):
                Path(asked).unlink()
            process.send_signal(signal.SIGTERM)
        time.sleep(_TICK)
    return status, 1024.0 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


class SlurmJob:
    """One job. Its memory is known once it has ended."""

    def __init__(self, job: Any, asked: Path) -> None:
        """``job``: submitit's."""
        self.job, self._asked_file, self._asked, self._peak = job, asked, False, 0.0
        self.pid: int | None = None

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        if self.job.exception() is not None:
            return 1
        status, self._peak = self.job.result()
        return int(status)

    def ask_to_end(self) -> None:
        if not self._asked:
            self._asked = True
            self._asked_file.touch()

    def kill(self) -> None:
        """Cancels it."""
        self.job.cancel(check=False)

    def look(self) -> None:
        """Nothing to see: it is on another machine."""

    def memory(self) -> float:
        return 0.0

    def peak_memory(self) -> float:
        return self._peak

    def cpu_seconds(self) -> float:
        return 0.0


def submit(
    settings: FleetSettings, line: list[str], directory: Path, log: Path, environment: Mapping[str, str], cpus: int
) -> SlurmJob:
    """Submits a job that runs ``line``; what submitit itself writes goes to ``directory/slurm``.

    Args:
        cpus: that it needs, where the settings do not say.

    Raises:
        UserError: submitit is not installed.
        Exception: SLURM refuses it, in submitit's words.
    """
    submitit = require("submitit", extra="fleet", purpose=f"--launcher {settings.launcher}")
    cluster = "slurm" if settings.launcher == "slurm" else "local"
    executor = submitit.AutoExecutor(folder=directory / "slurm", cluster=cluster)
    executor.update_parameters(
        name=directory.name,
        timeout_min=settings.slurm_minutes,
        cpus_per_task=settings.slurm_cpus or cpus,
        gpus_per_node=settings.slurm_gpus,
        tasks_per_node=1,
        **({"slurm_partition": settings.slurm_partition} if settings.slurm_partition else {}),
    )
    paths = [str(Path(megaforge.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # where the job finds run_line
    asked = directory.absolute() / ASKED_FILE
    with suppress(OSError):
        asked.unlink()
    job = executor.submit(run_line, line, str(log.absolute()), dict(environment), str(asked))
    return SlurmJob(job, asked)
