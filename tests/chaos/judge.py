"""Whether a disturbed run is the run that nothing disturbed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.monitor.names import MEASURED
from megaforge.monitor.sinks import read_metrics
from tests.chaos.disturbed import Disturbed
from tests.chaos.job import Job


def rows(job: Job) -> dict[int, dict[str, float]]:
    """Of each iteration, what its step was, without the numbers that depend on the clock.

    Raises:
        ValueError: an iteration is there twice.
    """
    found: dict[int, dict[str, float]] = {}
    for row in read_metrics(job.metrics):
        if row["kind"] == "step":
            if row["iteration"] in found:
                raise ValueError(f"iteration {row['iteration']} stands twice in {job.metrics}")
            found[row["iteration"]] = {name: value for name, value in row.items() if name not in MEASURED}
    return found


def last_tensors(job: Job) -> dict[str, str]:
    """Hash of each file of tensors of the last iteration's checkpoint, as it lies there now."""
    folder = job.save / f"step_{job.iterations:07d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("rank_*"))}


def findings(job: Job, calm: Job, run: Disturbed, done: bool, tensors: dict[str, str]) -> Iterator[str]:
    """What is wrong with the disturbed run; ``tensors``: :func:`last_tensors` of the calm one."""
    for number in run.hangs:
        yield f"fault {number}: nothing moved for longer than the timeout allows"
    if not done:
        yield "the job did not come to its end"
        return
    for met in run.met:
        if met.struck is None:
            yield f"fault {met.fault.number} ({met.fault.kind}) did not strike"
        if met.fault.kind == "second job" and met.note != "refused":
            yield f"fault {met.fault.number}: the second job was not refused ({met.note})"
        if met.fault.kind == "node lost" and met.struck is not None and met.tier != "memory":
            yield f"fault {met.fault.number}: the lost node's files did not come from its peer"
    ours, theirs = rows(job), rows(calm)
    if missing := theirs.keys() - ours.keys():
        yield f"iterations {sorted(missing)} were never trained"
    for iteration in sorted(ours):
        if ours[iteration] != theirs.get(iteration):
            yield f"iteration {iteration} is another one: {ours[iteration]} instead of {theirs.get(iteration)}"
            break
    if last_tensors(job) != tensors or not tensors:
        yield "the last checkpoint does not have the same bytes"


def redone(job: Job) -> int:
    """Steps that were made again: the rows that later attempts set aside."""
    aside = Path(f"{job.metrics}.abandoned")
    return sum(row["kind"] == "step" for row in read_metrics(aside)) if aside.exists() else 0


def spent(job: Job) -> dict[str, float]:
    """What the run's time went into, by its last event of that kind; nothing where it has told none."""
    path = job.save / EVENTS_FILE
    told = [event for event in read_events(path).events if event["kind"] == "goodput"] if path.exists() else []
    return dict(told[-1]["spent"]) if told else {}
