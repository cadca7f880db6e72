"""The run that meets the faults: launches until it is done, what happens outside of it, how long each fault cost."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from megaforge.resilience.faults import KINDS, Fault, Injector, Plan
from tests.chaos.job import Job, Launched, free_port

STARTUP = 90.0  # seconds that ranks may take to start on a busy machine, beyond the timeout


@dataclass
class Met:
    """What became of a fault.

    Attributes:
        struck: seconds, by this process's clock, when its mark was seen; None: it has not struck.
        reached: the newest iteration then.
        back: when an iteration beyond that was seen.
        note: what was seen of it outside of the run.
    """

    fault: Fault
    struck: float | None = None
    reached: int = 0
    back: float | None = None
    note: str = ""


@dataclass
class Disturbed:
    """Runs ``job`` under the faults of ``plan``, which lies at ``path``.

    Attributes:
        met: one a fault.
        launches: how often the job was launched.
        hangs: faults' numbers after which nothing moved for longer than it may.
    """

    job: Job
    plan: Plan
    path: Path
    restarts: int
    met: list[Met] = field(default_factory=list)
    launches: int = 0
    hangs: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, until: float) -> bool:
        """Launches until the job is done; whether it was, before the clock (monotonic) showed ``until``."""
        self.met = [Met(fault) for fault in self.plan.faults]
        self._injector = Injector(self.plan, -1, self.path.parent / "marks")
        self._port = free_port()
        began = time.monotonic()
        while time.monotonic() < until and self.launches <= len(self.plan.faults):
            self.launches += 1
            self._launched = self.job.launch(self._port, restarts=self.restarts, plan=self.path)
            patience = self.job.timeout + STARTUP
            status = self._launched.wait(self._progress, patience, self._poll)
            if status is None:
                self.hangs.append(max((met.fault.number for met in self.met if met.struck is not None), default=-1))
            if status == 0:
                self._poll()
                self.seconds = time.monotonic() - began
                return True
        self.seconds = time.monotonic() - began
        return False

    def _progress(self) -> tuple[int, int, int]:
        """What changes as long as the job does anything."""
        sizes = [path.stat().st_size if path.exists() else 0 for path in (self.job.metrics, self._log)]
        return sizes[0], sizes[1], len(list(self._injector.marks.iterdir()))

    @property
    def _log(self) -> Path:
        return self.job.home / "launch.log"

    def _poll(self) -> None:
        newest = newest_iteration(self.job.metrics)
        for met in self.met:
            if met.struck is None and self._injector._mark(met.fault).exists():
                met.struck, met.reached = time.monotonic(), newest
                self._outside(met)
            if met.struck is not None and met.back is None and newest > met.reached:
                met.back = time.monotonic()

    def _outside(self, met: Met) -> None:
        """What a fault needs that is not in the run."""
        if KINDS[met.fault.kind].action != "ask":
            return
        if met.fault.kind == "second job":
            other: Launched = self.job.second()
            try:
                status = other.process.wait(timeout=STARTUP)
            except subprocess.TimeoutExpired:
                other.kill()
                status = -1
            said = (self.job.home / "second.log").read_text(encoding="utf-8")
            met.note = "refused" if status and "another run saves there" in said else f"status {status}"
            self._injector.answer(met.fault).touch()
        else:  # the launcher dies with its ranks, and the next one has its address and its name
            self._launched.kill()
            met.note = "launched again at the same address"


def newest_iteration(metrics: Path) -> int:
    """Of the last whole row of a metrics file; 0: there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        rows = file.read().split(b"\n")[:-1]
    for row in reversed(rows):
        try:
            return int(json.loads(row)["iteration"])
        except ValueError:
            continue
    return 0
