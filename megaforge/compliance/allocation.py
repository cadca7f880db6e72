"""Rule 3: nothing is allocated once a program is initialised. Of a training run that is what it has taken of memory,
which must not rise any more behind the warm-up: of a GPU what torch's allocator holds, of a CPU the process's peak. The
metrics file has it each ``--log-interval``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megaforge.compliance.code import Code
from megaforge.compliance.measure import Measure, Rule, measured, not_measured
from megaforge.json_text import parse_json

UNITS = "intervals behind the warm-up"
WARM_UP = 0.1  # of the intervals, and two of them at least
ROSE = 1.001  # times what it was: less is the noise of Python's own objects
_MEASURES = ("reserved_memory_bytes", "peak_memory_bytes")


def of_code(code: Code) -> Measure:
    """Code alone does not tell."""
    return not_measured(UNITS, "it is measured on a run with a metrics file: name its directory")


def of_run(metrics: Path | None) -> Measure:
    """Intervals after which the peak of the fullest rank's memory was what it was before, of the run whose metrics
    these are."""
    if metrics is None or not metrics.is_file():
        return not_measured(UNITS, "the run has left no metrics file (--metrics-file)")
    return of_peaks(list(_peaks(metrics)))


def of_peaks(peaks: Sequence[tuple[int, float]]) -> Measure:
    """Of iterations and bytes."""
    warm = max(2, round(WARM_UP * len(peaks)))
    if len(peaks) <= warm:
        return not_measured(UNITS, f"the metrics file has {len(peaks)} intervals, and the first {warm} are the warm-up")
    highest = max(peak for _, peak in peaks[:warm])

    def verdicts() -> Iterator[tuple[str, str | None]]:
        reached = highest
        for iteration, peak in peaks[warm:]:
            rose = f"memory rose from {reached:,.0f} to {peak:,.0f} bytes" if peak > ROSE * reached else None
            reached = max(reached, peak)
            yield f"iteration {iteration}", rose

    return measured(UNITS, verdicts(), f"of the run's metrics file; the first {warm} intervals are the warm-up")


def _peaks(metrics: Path) -> Iterator[tuple[int, float]]:
    for line in metrics.read_bytes().splitlines():
        try:
            record = parse_json(line)
        except ValueError:  # a last line that a kill cut short
            continue
        known = [record[name] for name in _MEASURES if name in record] if isinstance(record, dict) else []
        if known and isinstance(known[0], int | float):
            yield int(record.get("iteration", 0)), float(known[0])


ALLOCATION = Rule(
    3,
    "no allocation after initialisation",
    "intervals of a run, behind the warm-up, in which its memory rose by more than a thousandth",
    of_code,
)
