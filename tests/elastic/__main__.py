"""The command: status 1 when anything is wrong."""

from __future__ import annotations

import argparse
import contextlib
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.monitor.sinks import read_metrics
from tests.chaos.job import REPO, Job, Launched, free_port
from tests.elastic import __doc__ as description
from tests.end_to_end.launch import environment
from tests.real_text import write_text

RANKS, ITERATIONS = 2, 200  # of a node; of the run
LIMIT = 600.0  # seconds that any part may take on a busy machine
TOLERANCE = 1e-7  # of losses and norms: sums of another order, in fp64, where no token goes to another expert for it
EXACT = ("--fp64", "--save-interval", "10")
WRITTEN = (*EXACT, "--tp", "2", "--pp", "2", "--elastic", "2:4")  # of four ranks; of two: chosen


@dataclass
class Nodes:
    """The nodes of ``job``, the first of which is where they meet."""

    job: Job
    port: int = field(default_factory=free_port)

    def start(self, name: str) -> Launched:
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", str(RANKS)]
        line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}", "--rdzv-id", "elastic"]
        line += ["--rdzv-conf", "last_call_timeout=5", "--max-restarts", "3", str(REPO / "pretrain_cdrmix.py")]
        self.job.home.mkdir(parents=True, exist_ok=True)
        with open(self.job.home / f"{name}.log", "ab") as out:
            line += self.job.flags(WRITTEN)
            process = subprocess.Popen(line, stdout=out, stderr=out, env=environment(), start_new_session=True)
            return Launched([process])

    def can_meet(self) -> bool:
        """Whether the first node is there."""
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", self.port)) == 0

    def iteration(self) -> int:
        """The newest in the metrics."""
        if not self.job.metrics.exists():
            return 0
        with contextlib.suppress(ValueError, OSError):
            return max((record["iteration"] for record in read_metrics(self.job.metrics)), default=0)
        return 0

    def worlds(self) -> list[int]:
        """Ranks of each start that there was."""
        path = self.job.save / EVENTS_FILE
        events = read_events(path).events if path.exists() else []
        return [event["layout"]["world"] for event in events if event["kind"] == "start"]


def until(condition: Callable[[], bool], what: str) -> float:
    """Seconds until it holds.

    Raises:
        TimeoutError: it does not.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > LIMIT:
            raise TimeoutError(what)
        time.sleep(0.1)
    return time.monotonic() - began


def disturbed(nodes: Nodes) -> list[str]:
    """Runs to the end, without the second node for a while; returns what was seen."""
    first = nodes.start("first")
    until(nodes.can_meet, "the first node did not begin")  # or the second would be where they meet
    second = nodes.start("second")
    try:
        until(lambda: nodes.iteration() >= 5 and nodes.worlds()[-1] == 2 * RANKS, "two nodes did not begin")
        second.kill()
        lost = nodes.iteration()
        seconds = until(lambda: nodes.worlds()[-1] == RANKS and nodes.iteration() > lost + 3, "one node did not go on")
        seen = [f"node lost at iteration {lost}: a step beyond it after {seconds:.0f} s"]
        second = nodes.start("second")
        seconds = until(lambda: nodes.worlds()[-1] == 2 * RANKS, "the node that came back was not taken")
        seen.append(f"node back at iteration {nodes.iteration()}: both train after {seconds:.0f} s")
        until(lambda: first.status() is not None, "the run did not end")
        return [*seen, f"status {first.status()}", f"ranks of its starts: {nodes.worlds()}"]
    finally:
        first.kill()
        second.kill()


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Where two runs' records are not of one run."""
    steps = [[one["iteration"] for one in records] for records in (found, expected)]
    if steps[0] != steps[1]:
        return [f"iterations {steps[0][:3]} to {steps[0][-3:]} ({len(steps[0])}) in place of {len(steps[1])}"]
    wrong = []
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "consumed_samples"):
            if name in theirs and not math.isclose(ours[name], theirs[name], rel_tol=TOLERANCE):
                wrong.append(f"iteration {ours['iteration']}: {name} {ours[name]} in place of {theirs[name]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder that keeps everything (default: a temporary one)")
    flags = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = flags.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elastic_")))
        write_text(home)
        jobs = [Job(home / name, home, 2 * RANKS, ITERATIONS, 60.0) for name in ("disturbed", "undisturbed")]
        for line in disturbed(Nodes(jobs[0])):
            print(line, flush=True)
        alone = [sys.executable, str(REPO / "pretrain_cdrmix.py"), *jobs[1].flags(EXACT)]
        subprocess.run(alone, env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wrong = differences(*([*read_metrics(job.metrics)] for job in jobs))
        print("\n".join(wrong[:10]) or f"{ITERATIONS} iterations as those of one rank that nothing happened to")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
