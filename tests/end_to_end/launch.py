"""Starting the real scripts as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.monitor.names import MEASURED
from megaforge.monitor.sinks import read_metrics
from tests.held import HeldRun

REPO = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds after which a run counts as hung; a busy machine is slow to start Python


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which the script complains, to standard error or in torchrun's summary."""
        lines = [line.removeprefix("  traceback : ") for line in self.err.splitlines()]
        return [line for line in lines if line.startswith("error")]


def command(ranks: int, script: str, *arguments: str) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(REPO / script), *arguments]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(REPO)}


def run(ranks: int, script: str, *arguments: str, **popen: Any) -> Outcome:
    """Runs to the end.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    done = subprocess.run(
        command(ranks, script, *arguments), capture_output=True, text=True, timeout=LIMIT, env=environment(), **popen
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_and_kill_a_rank(
    ranks: int, script: str, *arguments: str, metrics: Path, step: int, number: int = signal.SIGKILL, restarts: int = 0
) -> int:
    """Starts a run and sends signal ``number`` to its last rank once ``metrics`` shows ``step``, where that rank waits
    for it; waits until all have ended, after ``restarts`` of them by torchrun at most, and returns the status."""
    with tempfile.TemporaryDirectory() as folder:
        waiting = HeldRun(Path(folder) / "plan", step + 1, ranks - 1)
        return _kill_a_rank(command(ranks, script, *arguments), waiting, metrics, step, number, restarts)


def _kill_a_rank(line: list[str], waiting: HeldRun, metrics: Path, step: int, number: int, restarts: int) -> int:
    if restarts:
        line.insert(line.index("--standalone"), f"--max-restarts={restarts}")
    variables, nowhere = environment() | waiting.variables, subprocess.DEVNULL
    process = subprocess.Popen(line, stdout=nowhere, stderr=nowhere, env=variables)
    deadline = time.monotonic() + LIMIT
    try:
        while not (waiting.stands and metrics.exists() and f'"iteration": {step},' in metrics.read_text()):
            assert process.poll() is None, f"ended before step {step} with status {process.returncode}"
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.005)
        victim = children(process.pid)[-1] if "torch.distributed.run" in line else process.pid
        os.kill(victim, number)
        waiting.release()
        return process.wait(timeout=LIMIT)
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    """Process ids of the direct children, as the kernel lists them."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by now
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Process ids of the children, of theirs, and so on."""
    own = children(pid)
    return [*own, *(one for child in own for one in descendants(child))]


def records(path: Path) -> list[dict[str, Any]]:
    """What a run wrote, without the one number that depends on the clock."""
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(path)]
