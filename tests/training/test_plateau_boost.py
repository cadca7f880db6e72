"""The plateau booster's rule: when it begins, each way it ends, and that the scheduled rate comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.metrics import StepMetrics
from megaforge.training.plateau_boost import PlateauBoost
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_trainer, record, write_dataset

CONFIG = OptimizerConfig(plateau_boost=True, plateau_boost_interval=2, plateau_boost_intervals=3)


class Run:
    """A stand-in for the trainer whose losses are given."""

    def __init__(self, boost: PlateauBoost, iteration: int = 0) -> None:
        self.boost, self.iteration = boost, iteration
        self.lr_factors: dict[str, float] = {}
        self.recorded: list[dict[str, Any]] = []

    def run(self, losses: list[float]) -> list[float]:
        """The factor on the rate of each step."""
        factors = []
        for loss in losses:
            self.boost.on_step_start(cast(Trainer, self))
            factors.append(math.prod(self.lr_factors.values()))
            self.iteration += 1
            metrics = StepMetrics(self.iteration, loss, 1.0, 1e-3, 1, 1, 1)
            self.boost.on_step_end(cast(Trainer, self), metrics)
            assert self.lr_factors == {} and metrics.extra["lr_boost"] == factors[-1]
            self.recorded.append(metrics.extra)
        return factors


def factors_of(intervals: list[float], config: OptimizerConfig = CONFIG) -> list[float]:
    """The factor of every interval, whose mean losses are given; the two steps of one have the same."""
    found = Run(PlateauBoost(config)).run([loss for mean in intervals for loss in (mean - 0.5, mean + 0.5)])
    assert found[::2] == found[1::2]
    return found[::2]


def test_it_begins_where_the_loss_stands_still() -> None:
    assert factors_of([10, 8, 6, 5.41, 5.4]) == [1, 1, 1, 1, 2]
    assert factors_of([10, 10, 10]) == [1, 1, 2], "the first interval has nothing before it"
    assert factors_of([10, 9, 9]) == [1, 1, 1], "an improvement of the trigger is enough"
    assert factors_of([10, 10, 10], OptimizerConfig(plateau_boost_interval=2, plateau_boost_factor=3.5))[-1] == 3.5


def test_it_ends_where_the_loss_improves_and_may_begin_again() -> None:
    assert factors_of([10, 10, 8, 8, 8]) == [1, 1, 2, 1, 2]


def test_it_ends_where_the_loss_rises_by_more_than_a_twentieth_above_its_value_at_the_beginning() -> None:
    assert factors_of([10, 10, 10.5, 10.51, 10.5]) == [1, 1, 2, 2, 1]
    assert factors_of([10, 10, 9.5, 10, 10]) == [1, 1, 2, 2, 2], "back up is no rise above the beginning"


def test_it_ends_after_its_longest_and_needs_an_improvement_to_begin_again() -> None:
    assert factors_of([10] * 9) == [1, 1, 2, 2, 2, 1, 1, 1, 1], "a converged run is not boosted for ever"
    assert factors_of([10] * 6 + [8, 8, 8]) == [1, 1, 2, 2, 2, 1, 1, 1, 2]


def test_losses_that_are_not_finite_or_zero() -> None:
    run = Run(PlateauBoost(CONFIG))
    assert run.run([10.0, math.nan, 10.0, math.inf, 10.0, 10.0])[-2:] == [2, 2]
    assert Run(PlateauBoost(CONFIG)).run([math.nan] * 6 + [10.0] * 4 + [1.0])[-3:] == [1, 1, 2]
    assert factors_of([0.0, 0.0, 0.0], CONFIG) == [1, 1, 2]
    assert factors_of([-10, -12, -12.1, -12], CONFIG) == [1, 1, 1, 2], "a term may be negative"


def test_what_is_recorded() -> None:
    run = Run(PlateauBoost(CONFIG))
    run.run([10.0, 10.0, 8.0, 9.0, 9.0])
    assert ["plateau_improvement" in extra for extra in run.recorded] == [False, False, False, True, False]
    assert run.recorded[3]["plateau_improvement"] == pytest.approx(0.15)


def test_it_goes_on_from_its_state_at_any_step() -> None:
    losses = [float(x) for x in (10, 10, 10, 10, 9, 9.9, 7, 7, 7, 7, 7, 7, 7, 7, 7.1, 7, 6, 5, 5, 5)]
    whole = Run(PlateauBoost(CONFIG)).run(losses)
    assert {1.0, 2.0} == set(whole)
    for stop in range(len(losses)):
        first = PlateauBoost(CONFIG)
        before = Run(first).run(losses[:stop])
        second = PlateauBoost(CONFIG)
        second.load_state(first.state())
        assert before + Run(second, stop).run(losses[stop:]) == whole


def test_a_run_is_boosted_resumed_and_continued_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, save = write_dataset(tmp_path / "train_text_document"), str(tmp_path / "run")
    boost = ("--plateau-boost", "--plateau-boost-interval", "1", "--plateau-boost-trigger", "0.9")
    line = arguments(prefix, "--lr", "1e-5", *boost)
    trainer = make_trainer(line)
    whole = record(trainer)
    trainer.train()
    rates = [step["lr"] for step in whole.records if step["kind"] == "step"]
    assert rates == [1e-5, 1e-5, 2e-5, 2e-5, 2e-5, 2e-5] == [1e-5 * step["lr_boost"] for step in whole.records[:6]]
    assert "--plateau-boost: iteration 2: the loss" in "".join(capsys.readouterr())
    make_trainer([*line, "--save", save, "--exit-interval", "3"]).train()
    resumed = make_trainer([*line, "--load", save])
    rest = record(resumed)
    resumed.train()
    assert rest.records == whole.records[3:]
    capsys.readouterr()
    plain = make_trainer(arguments(prefix, "--lr", "1e-5", "--load", save))
    told = "".join(capsys.readouterr())
    assert "what it keeps as callbacks.plateau_boost is not part of this run" in told
    assert "--plateau-boost True in the checkpoint, False here" in told
    off = record(plain)
    plain.train()
    assert [step["lr"] for step in off.records if step["kind"] == "step"] == [1e-5] * 3
