"""The curves of runs as a page draws them: chosen, smoothed, and thinned to as many points as a screen shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megaforge.errors import UserError
from megaforge.monitor.runs import Columns, Run

Axis = NDArray[numpy.float64]
AXES = ("iteration", "tokens", "time")
EVALUATION = "valid/"  # before the names of evaluations' numbers, as trackers have them
_BLOCK = 64  # values that one product smooths


@dataclass(frozen=True)
class View:
    """How curves are shown.

    Attributes:
        axis: of ``AXES``: steps, tokens, or hours of training.
        points: the most of a curve.
        smooth: weight of the past in a running mean that is shown as well, below 1; 0: none.
        low, high: the part of the axis that is shown.
    """

    axis: str = "iteration"
    points: int = 800
    smooth: float = 0.0
    low: float = -numpy.inf
    high: float = numpy.inf

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a value makes no sense.
        """
        if self.axis not in AXES:
            raise UserError(f"x {self.axis}: expected one of {', '.join(AXES)}")
        if not 2 <= self.points <= 10_000:
            raise UserError(f"points {self.points}: must be from 2 to 10000")
        if not 0 <= self.smooth < 1:
            raise UserError(f"smooth {self.smooth}: must be at least 0 and below 1")
        if not self.low < self.high:
            raise UserError(f"low {self.low}, high {self.high}: low must be below high")


def metrics_of(run: Run) -> list[str]:
    """The names of a run's numbers; those of evaluations begin with ``valid/``."""
    return [*run.steps, *(EVALUATION + name for name in run.evaluations)]


def copied(run: Run, metric: str, axis: str) -> tuple[Axis, Axis] | None:
    """(places on the axis, values) of a metric, in copies that stay as they are while the run grows; without values
    that are not finite. None: the run does not have it.

    An evaluation has the place of its iteration's step: its own ``tokens`` are those that it evaluated.
    """
    evaluation = metric.startswith(EVALUATION)
    columns = run.evaluations if evaluation else run.steps
    name = metric.removeprefix(EVALUATION)
    places = _places(run.steps, axis)
    if name not in set(columns) or places is None:
        return None
    values = numpy.array(columns[name])
    if evaluation:
        own = numpy.array(columns["iteration"])
        if axis == "iteration":
            places = own
        else:
            at = numpy.searchsorted(numpy.array(run.steps["iteration"]), own, side="right") - 1
            places = numpy.where(at >= 0, places[at], numpy.nan)
    kept = numpy.isfinite(values) & numpy.isfinite(places)
    return places[kept], values[kept]


def _places(steps: Columns, axis: str) -> Axis | None:
    """Where the steps are on an axis."""
    column = {"iteration": "iteration", "tokens": "tokens", "time": "step_seconds"}[axis]
    if column not in set(steps):
        return None
    found = numpy.array(steps[column])
    return numpy.cumsum(numpy.nan_to_num(found)) / 3600 if axis == "time" else found


def running_mean(values: Axis, weight: float) -> Axis:
    """Exponential mean whose weights sum to 1 at every point (Kingma and Ba, arXiv 1412.6980, section 3), as
    ``tools/plot_loss.py`` draws it; in blocks, so that a million values take some 50 ms."""
    if not weight or not len(values):
        return values
    with numpy.errstate(under="ignore"):
        share = 1 - weight ** numpy.arange(1.0, len(values) + 1)
        return (1 - weight) * _decayed_sum(values, weight) / share


def _decayed_sum(values: Axis, weight: float) -> Axis:
    """``out[i] = weight * out[i - 1] + values[i]``."""
    age = numpy.subtract.outer(numpy.arange(_BLOCK), numpy.arange(_BLOCK))
    within = numpy.where(age >= 0, weight ** numpy.maximum(age, 0.0), 0.0)
    padded = numpy.concatenate([values, numpy.zeros(-len(values) % _BLOCK)]).reshape(-1, _BLOCK)
    sums = padded @ within.T
    if len(sums) > 1:  # what a block hands to the next follows the same rule, block by block
        carried = _decayed_sum(sums[:, -1].copy(), weight**_BLOCK)
        sums[1:] += numpy.outer(carried[:-1], weight ** numpy.arange(1.0, _BLOCK + 1))
    return sums.reshape(-1)[: len(values)]


def thinned(places: Axis, values: Axis, points: int) -> tuple[Axis, Axis]:
    """At most ``points`` of them, in their order: the least and the greatest of each of ``points // 2`` ranges of alike
    many, so that no spike is lost; the first and the last point are always there."""
    if len(values) <= points:
        return places, values
    if points < 4:
        chosen = numpy.array([0, len(values) - 1])
        return places[chosen], values[chosen]
    inner = len(values) - 2
    edges = numpy.linspace(1, 1 + inner, (points - 2) // 2 + 1).astype(int)
    lengths = numpy.diff(edges)
    # A table with a range a row; short ranges repeat their last value.
    at = numpy.minimum(edges[:-1, None] + numpy.arange(lengths.max()), edges[1:, None] - 1)
    table, rows = values[at], numpy.arange(len(lengths))
    least, most = at[rows, table.argmin(axis=1)], at[rows, table.argmax(axis=1)]
    chosen = numpy.unique(numpy.concatenate([[0, len(values) - 1], least, most]))
    return places[chosen], values[chosen]


def curves(found: Mapping[tuple[str, str], tuple[Axis, Axis]], view: View) -> list[dict[str, Any]]:
    """What the page draws of {(run, metric): (places, values)}: each metric as it is, and smoothed where it is asked
    for (an evaluation never is). A mean is over all that came before, outside of the shown part too."""
    out = []
    for (run, metric), (places, values) in found.items():
        inside = (places >= view.low) & (places <= view.high)
        versions = [(False, values)]
        if view.smooth and not metric.startswith(EVALUATION):
            versions.append((True, running_mean(values, view.smooth)))
        for smoothed, shown in versions:
            x, y = thinned(places[inside], shown[inside], view.points)
            about = {"run": run, "metric": metric, "smoothed": smoothed, "count": int(inside.sum())}
            out.append({**about, "x": _written(x), "y": _written(y)})
    return out


def _written(values: Axis) -> list[float]:
    """As the shortest text that tells values of a screen apart: seven digits."""
    return [float(f"{value:.10g}") for value in values.tolist()]
