"""Curves: what is taken from a run, smoothed and thinned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from megaforge.dashboard.series import View, copied, curves, metrics_of, running_mean, thinned
from megaforge.errors import UserError
from megaforge.monitor.runs import Run
from tests.dashboard.serving import a_run, stepped
from tools.plot_loss import running_mean as readable_mean


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 4097, 5000])
def test_the_mean_is_that_of_the_loop(weight: float, count: int) -> None:
    values = numpy.random.default_rng(0).lognormal(0, 6, count)  # twelve powers of ten apart
    expected = readable_mean(values.tolist(), weight)
    numpy.testing.assert_allclose(running_mean(values, weight), expected, rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 12, 13, 99, 1000, 100_003])
@pytest.mark.parametrize("points", [2, 3, 4, 10, 11])
def test_thinning_keeps_ends_order_and_extremes(count: int, points: int) -> None:
    values = numpy.random.default_rng(count).standard_normal(count)
    places = numpy.arange(count) * 2.0
    x, y = thinned(places, values, points)
    assert len(x) == len(y) <= max(points, 2) and (numpy.diff(x) > 0).all()
    numpy.testing.assert_array_equal(y, values[(x / 2).astype(int)])
    if count:
        assert (x[0], x[-1]) == (0, 2 * (count - 1))
    if count <= points:
        numpy.testing.assert_array_equal(y, values)
    elif points >= 4:
        assert (y.min(), y.max()) == (values.min(), values.max())


def test_a_spike_of_one_step_in_a_million_is_drawn() -> None:
    values = numpy.zeros(1_000_000)
    values[123_456] = 7.0
    x, y = thinned(numpy.arange(1e6), values, 800)
    assert x[y == 7.0].tolist() == [123_456] and len(x) <= 800


def a_run_with_evaluations(folder: Path) -> Run:
    a_run(folder, steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "evaluation", "iteration": 2, "loss": 0.25, "tokens": 5}) + "\n")
    stepped(folder, 3, 3, loss=None)
    stepped(folder, 4, 4)
    run = Run("r", folder)
    run.poll()
    return run


def test_places_on_each_axis(tmp_path: Path) -> None:
    run = a_run_with_evaluations(tmp_path / "r")
    assert metrics_of(run) == [
        "iteration",
        "loss",
        "tokens",
        "step_seconds",
        "valid/iteration",
        "valid/loss",
        "valid/tokens",
    ]
    hours = [0.5 / 3600, 1 / 3600, 2 / 3600]
    for axis, expected, of_evaluation in (
        ("iteration", [1, 2, 4], 2),
        ("tokens", [10, 20, 40], 20),
        ("time", hours, hours[1]),
    ):
        places, values = copied(run, "loss", axis) or pytest.fail("it is not there")
        assert places.tolist() == pytest.approx(expected) and values.tolist() == [1, 0.5, 0.25]  # without step 3
        places, values = copied(run, "valid/loss", axis) or pytest.fail("it is not there")
        assert places.tolist() == pytest.approx([of_evaluation]) and values.tolist() == [0.25]
    assert copied(run, "lr", "iteration") is None and copied(run, "valid/lr", "tokens") is None
    assert copied(Run("none", tmp_path / "none"), "loss", "tokens") is None


def test_a_part_of_the_axis_with_its_mean(tmp_path: Path) -> None:
    places, values = numpy.arange(1.0, 101), numpy.arange(1.0, 101)
    found = {("r", "loss"): (places, values), ("r", "valid/loss"): (places, values)}
    drawn = curves(found, View(smooth=0.5, low=50, high=52, points=100))
    assert [(one["metric"], one["smoothed"], one["count"]) for one in drawn] == [
        ("loss", False, 3),
        ("loss", True, 3),
        ("valid/loss", False, 3),
    ]
    assert drawn[0]["x"] == [50, 51, 52] == drawn[0]["y"]
    assert drawn[1]["y"] == pytest.approx(readable_mean(values.tolist(), 0.5)[49:52])  # of what came before as well
    assert curves({("r", "loss"): (places[:0], values[:0])}, View(smooth=0.9))[0]["y"] == []


@pytest.mark.parametrize(
    "values, word",
    [
        ({"axis": "epoch"}, "x epoch: expected one of iteration, tokens, time"),
        ({"points": 1}, "points 1"),
        ({"points": 10**9}, "points 1000000000"),
        ({"smooth": 1.0}, "smooth 1.0"),
        ({"smooth": float("nan")}, "smooth nan"),
        ({"low": 2.0, "high": 1.0}, "low 2.0, high 1.0"),
        ({"low": float("nan")}, "low nan"),
    ],
)
def test_a_view_that_makes_no_sense(values: dict[str, float], word: str) -> None:
    with pytest.raises(UserError, match=word):
        View(**values)  # type: ignore[arg-type]
