"""The run that meets the faults: launches until it is done, what happens outside of it, how long each fault cost."""

from __future__ import annotations

import json
import math
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from megaforge.resilience.faults import KINDS, Fault, Injector, Plan
from tests.chaos.job import Job, free_port
from tests.chaos.network import Network

STARTUP = 90.0  # seconds that ranks may take to start on a busy machine, beyond the timeout


@dataclass
class Met:
    """What became of a fault.

    Attributes:
        struck: seconds, by this process's clock, when its mark was seen; None: it has not struck.
        reached: the newest iteration then.
        back: when an iteration beyond that was seen.
        note: what was seen of it outside of the run.
        tier: what the run went on from: ``memory`` or ``disk``; empty where it did not end.
    """

    fault: Fault
    struck: float | None = None
    reached: int = 0
    back: float | None = None
    note: str = ""
    tier: str = ""


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
    network: Network | None = None
    _mend_at: float = math.inf
    _read: int = 0

    def run(self, until: float) -> bool:
        """Launches until the job is done; whether it was, before the clock (monotonic) showed ``until``."""
        self.met = [Met(fault) for fault in self.plan.faults]
        self._injector = Injector(self.plan, -1, self.path.parent / "marks")
        self._port = free_port()
        began = time.monotonic()
        while time.monotonic() < until and self.launches < len(self.plan.faults) + 5:
            self.launches += 1
            self._mend()
            self._launched = self.job.launch(self._port, restarts=self.restarts, plan=self.path, network=self.network)
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

    def _tiers(self) -> None:
        """What the run says that it goes on from belongs to all faults before."""
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read += whole
        for line in new[:whole].decode(errors="replace").splitlines():
            if line.startswith("loading "):
                for met in self.met:
                    if met.struck is not None and not met.tier and KINDS[met.fault.kind].ends:
                        met.tier = "memory" if str(self.job.home / "memory") in line else "disk"

    def _mend(self) -> None:
        if self.network is not None and self.network.is_cut:
            self.network.mend()
        self._mend_at = math.inf

    def _poll(self) -> None:
        self._tiers()
        if time.monotonic() > self._mend_at:
            self._mend()
        newest = newest_iteration(self.job.metrics)
        for met in self.met:
            if met.struck is None and self._injector._mark(met.fault).exists():
                met.struck, met.reached = time.monotonic(), newest
                self._outside(met)
            if met.struck is not None and met.back is None and newest > met.reached:
                met.back = time.monotonic()

    def _outside(self, met: Met) -> None:
        """What a fault needs that is not in the run."""
        if KINDS[met.fault.kind].action not in ("ask", "linger"):
            return
        if met.fault.kind == "second job":
            other = self.job.second()
            try:
                status = other.processes[0].wait(timeout=STARTUP)
            except subprocess.TimeoutExpired:
                other.kill()
                status = -1
            said = (self.job.home / "second.log").read_text(encoding="utf-8")
            met.note = "refused" if status and "another run saves there" in said else f"status {status}"
            self._injector.answer(met.fault).touch()
        elif met.fault.kind == "network cut":
            assert self.network is not None
            self.network.cut()
            self._mend_at = time.monotonic() + self.job.timeout + 10
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
