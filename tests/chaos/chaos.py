"""A run that nothing disturbs, and the same under faults."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaforge.resilience.faults import Plan, draw
from tests.chaos.disturbed import Disturbed
from tests.chaos.job import Job, free_port
from tests.chaos.judge import findings, last_tensors, redone, spent
from tests.chaos.network import Network
from tests.real_text import write_text

FIRST, STRIDE = 7, 4  # two checkpoints are there before the first fault, and one more before the next


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        run: the disturbed run.
        findings: what is wrong; empty: nothing.
        calm_seconds: of the run that nothing disturbed.
        redone: steps that were made twice.
        spent: seconds that the disturbed run's time went into, by what, as the run itself counts them.
    """

    run: Disturbed
    seed: int
    findings: list[str]
    calm_seconds: float
    redone: int
    spent: dict[str, float]


def chaos(
    home: Path,
    *,
    count: int,
    seed: int,
    ranks: int,
    kinds: Sequence[str],
    timeout: float,
    restarts: int,
    text: Path | None = None,
    minutes: float | None = None,
    own_disk: bool = False,
    network: Network | None = None,
) -> Outcome:
    """Runs both below ``home`` and compares them."""
    if text is None:
        text = home / "text"
        write_text(text)
    iterations = FIRST + count * STRIDE + 4
    calm, job = (Job(home / name, text, ranks, iterations, timeout) for name in ("calm", "disturbed"))
    began = time.monotonic()
    until = math.inf if minutes is None else began + 60 * minutes
    if (status := calm.launch(free_port()).processes[0].wait()) != 0:
        said = (calm.home / "launch.log").read_text(encoding="utf-8")
        raise RuntimeError(f"the run that nothing disturbs ended with {status}:\n{said}")
    calm_seconds = time.monotonic() - began
    faults = draw(seed, count, ranks=ranks, first=FIRST, stride=STRIDE, kinds=kinds)
    memory = "" if job.node_ranks is None else str(job.memory)
    plan = Plan(str(job.save), faults, own_disk, memory, job.node_ranks or 1)
    path = home / "plan" / "plan.json"
    path.parent.mkdir(parents=True)
    plan.write(path)
    run = Disturbed(job, plan, path, restarts, network=network)
    done = run.run(until)
    found = list(findings(job, calm, run, done, last_tensors(calm)))
    return Outcome(run, seed, found, calm_seconds, redone(job), spent(job))
