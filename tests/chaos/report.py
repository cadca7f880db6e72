"""What a run under faults has shown, as Markdown."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

from megaforge.resilience.faults import KINDS
from tests.chaos.chaos import Outcome
from tests.chaos.disturbed import Met


def report(outcome: Outcome) -> str:
    """A table by kinds of faults, and the sums."""
    return "\n".join(_lines(outcome)) + "\n"


def _lines(outcome: Outcome) -> Iterator[str]:
    run, job = outcome.run, outcome.run.job
    struck = [met for met in run.met if met.struck is not None]
    seed, steps, now = outcome.seed, job.iterations, time.strftime("%Y-%m-%d")
    yield f"{len(struck)} of {len(run.met)} faults (seed {seed}) in {steps} iterations of {job.ranks} ranks, {now}:"
    yield f"{run.launches} launches and {run.seconds:.0f} s, against {outcome.calm_seconds:.0f} s without faults;"
    yield f"{outcome.redone} steps were made again."
    if outcome.spent:
        most = sorted(outcome.spent.items(), key=lambda item: -item[1])
        yield (
            "The run's own account: "
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in most if seconds >= 1)
            + "."
        )
    yield ""
    yield "| fault | times | came back | from memory, disk | until a new step, s (median, longest) |"
    yield "|---|---|---|---|---|"
    by_kind = defaultdict[str, list[Met]](list)
    for met in struck:
        by_kind[met.fault.kind].append(met)
    for kind in KINDS:
        if by_kind[kind]:
            yield _row(kind, by_kind[kind])
    yield ""
    if outcome.findings:
        yield "Wrong:"
        yield ""
        yield from (f"- {finding}" for finding in outcome.findings)
    else:
        yield "Every iteration's numbers and the bytes of the last checkpoint are those of the run without faults."


def _row(kind: str, met: list[Met]) -> str:
    seconds = [one.back - one.struck for one in met if one.back is not None and one.struck is not None]
    took = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "-"
    tiers = ", ".join(str(sum(one.tier == tier for one in met)) for tier in ("memory", "disk"))
    return f"| {kind} | {len(met)} | {len(seconds)} | {tiers if KINDS[kind].ends else '-'} | {took} |"
