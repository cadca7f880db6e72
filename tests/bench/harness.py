"""Interleaved measurement shared by the benchmarks.

Every benchmark compares a candidate with a peer in one process and one run, turn about, because two runs on a shared
machine differ more than the programs do. A measure is a plain function that runs its subject once and returns one
number: seconds, CPU-seconds or a rate such as tokens per second. A ratio is always candidate / peer.

Both sides, and what they start, keep the host memory that they free, as training does; this module sees to it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.device import LARGEST_KEPT, keep_host_memory

if keep_host_memory():
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT), "MALLOC_TRIM_THRESHOLD_": "-1"}

Measure = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """Candidate over peer: the median, least and greatest of the rounds, and both sides' own medians."""

    median: float
    min: float
    max: float
    candidate: float = 0.0
    peer: float = 0.0

    def case(self, peer: str, **extra: Any) -> dict[str, Any]:
        """The JSON object of one case; ``peer`` says in words what it was measured against."""
        return {
            "ratio": round(self.median, 4),
            "min": round(self.min, 4),
            "max": round(self.max, 4),
            "peer": peer,
            **extra,
        }


def seconds(function: Callable[[], object], repeat: int = 1, clock: Callable[[], float] = time.perf_counter) -> Measure:
    """A measure: wall seconds, or those of another ``clock``, of one call of ``function``, averaged over ``repeat``
    calls in a row."""

    def measure() -> float:
        start = clock()
        for _ in range(repeat):
            function()
        return (clock() - start) / repeat

    return measure


def cpu_seconds(function: Callable[[], object], repeat: int = 1) -> Measure:
    """A measure: processor seconds of this thread, likewise."""
    return seconds(function, repeat, time.thread_time)


def interleaved_ratio(candidate: Measure, peer: Measure, rounds: int, warmup: int = 1) -> Ratio:
    """Runs both measures ``rounds`` times, turn about, and returns the ratios of the pairs.

    The order within a pair alternates, so that neither side always runs on the other's warm or dirty caches.
    The garbage collector rests meanwhile: a collection would be charged to whoever runs.
    """
    for _ in range(warmup):
        candidate()
        peer()
    ours: list[float] = []
    theirs: list[float] = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(rounds):
            gc.collect()
            if round_number % 2:
                theirs.append(peer())
                ours.append(candidate())
            else:
                ours.append(candidate())
                theirs.append(peer())
    finally:
        if was_enabled:
            gc.enable()
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Ratio(
        statistics.median(ratios), min(ratios), max(ratios), statistics.median(ours), statistics.median(theirs)
    )


def print_table(title: str, header: list[str], rows: list[list[object]]) -> None:
    """Prints ``rows`` under ``header`` in aligned columns; floats get four significant digits."""
    cells = [header] + [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(title)
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(bench: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the benchmark's last line: one JSON object for programs to read."""
    print(json.dumps({"bench": bench, "cases": cases}), flush=True)
