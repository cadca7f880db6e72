"""Callbacks against a stand-in for the trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megaforge.monitor.events import EventLog
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import (
    Callback,
    Checkpointing,
    EarlyStopping,
    Evaluation,
    ExitInterval,
    MetricsWriter,
    in_order,
)
from megaforge.training.intervals import Interval
from megaforge.training.metrics import EvaluationMetrics, StepMetrics
from megaforge.training.trainer import Trainer


class FakeTrainer:
    """Runs callbacks over steps, with evaluation losses that are given."""

    def __init__(self, iterations: int, callbacks: list[Callback], losses: dict[int, float] | None = None) -> None:
        self.iterations, self.callbacks, self.losses = iterations, callbacks, losses or {}
        self.iteration = 0
        self.reason: str | None = None
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.log: list[str] = []
        self.interrupted = self.save_due = self.save_written = False
        self.saved_iteration, self.events = 0, EventLog()
        self.replica, self.ctx = None, ParallelContext.single()
        self.last_evaluation: EvaluationMetrics | None = None
        self.config = SimpleNamespace(training=SimpleNamespace(train_iters=iterations))

    @property
    def finished(self) -> bool:
        return self.iteration >= self.iterations or self.reason is not None

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def evaluate(self, due: bool) -> None:
        self.evaluated.append(self.iteration)
        self.log.append(f"E{self.iteration}")
        loss = self.losses.get(self.iteration, 1.0)
        self.last_evaluation = metrics = EvaluationMetrics(self.iteration, 10 * loss, 10, correct=5, due=due)
        for callback in self.callbacks:
            callback.on_evaluate(cast(Trainer, self), metrics)

    def in_background(self, path: Path) -> bool:
        return False

    def save(self) -> None:
        self.saved.append(self.iteration)
        self.saved_iteration = self.iteration
        self.log.append(f"S{self.iteration}")
        for callback in self.callbacks:
            callback.on_checkpoint(cast(Trainer, self), Path())

    def run(self) -> FakeTrainer:
        while not self.finished:
            self.iteration += 1
            for callback in self.callbacks:
                callback.on_step_end(cast(Trainer, self), step(self.iteration))
        return self


def step(iteration: int) -> StepMetrics:
    return StepMetrics(iteration, 2.0, 1.0, 1e-3, 100 * iteration, iteration, 100)


def test_the_place_decides_and_not_the_order_of_adding() -> None:
    writer, other = MetricsWriter([]), Callback()
    judges: list[Callback] = [Evaluation(Interval(1)), EarlyStopping("loss", 1)]
    added = [other, Checkpointing(Interval(0)), *judges, writer, ExitInterval(Interval(3), "--exit-interval 3")]
    assert in_order(added) == [added[5], writer, *judges, added[1], other]
    trainer = FakeTrainer(
        9,
        in_order([Checkpointing(Interval(0)), Evaluation(Interval(2)), ExitInterval(Interval(3), "--exit-interval 3")]),
    ).run()
    assert (trainer.saved, trainer.evaluated) == ([3], [2, 3]), "the last step is the last for all"


def test_evaluation_and_checkpoints_come_at_their_intervals_and_at_the_end() -> None:
    trainer = FakeTrainer(7, [Evaluation(Interval(3)), Checkpointing(Interval(2))]).run()
    assert trainer.evaluated == [3, 6, 7]
    assert trainer.saved == [2, 4, 6, 7]


def test_interval_zero_means_only_at_the_end() -> None:
    trainer = FakeTrainer(4, [Evaluation(Interval(0)), Checkpointing(Interval(0))]).run()
    assert (trainer.evaluated, trainer.saved) == ([4], [4])


def test_an_end_that_falls_on_the_interval_is_saved_once() -> None:
    assert FakeTrainer(4, [Checkpointing(Interval(2))]).run().saved == [2, 4]


def test_exit_interval_ends_saved() -> None:
    trainer = FakeTrainer(
        9, [ExitInterval(Interval(4), "--exit-interval 4"), Evaluation(Interval(0)), Checkpointing(Interval(0))]
    ).run()
    assert (trainer.iteration, trainer.saved, trainer.evaluated) == (4, [4], [4])
    assert trainer.reason == "--exit-interval 4"


class AskedToEnd(Callback):
    """As by a signal in step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.iteration == self.step:
            trainer.interrupted = True
            trainer.stop("asked")


@pytest.mark.parametrize(("asked", "order"), [(2, "S2"), (3, "E3 S3"), (4, "E3 S4"), (5, "E3 S5 E5")])
def test_a_run_that_was_asked_to_end_saves_and_evaluates_only_at_its_end(asked: int, order: str) -> None:
    trainer = FakeTrainer(5, [AskedToEnd(asked), Evaluation(Interval(3)), Checkpointing(Interval(0))]).run()
    assert trainer.log == order.split()


def test_early_stopping_counts_evaluations_without_a_better_one() -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.9, 5: 2.0, 6: 1.9, 7: 1.0}
    trainer = FakeTrainer(
        9, [Evaluation(Interval(1)), EarlyStopping("loss", 2), Checkpointing(Interval(0))], losses
    ).run()
    assert trainer.iteration == 6, "1.9 again is not better than 1.9"
    assert trainer.saved == [6], "the checkpoint callback must see the stop as the last step"
    assert trainer.reason is not None and "1.9 (iteration 4)" in trainer.reason


def test_patience_zero_only_remembers_the_best() -> None:
    stopping = EarlyStopping("loss", 0)
    trainer = FakeTrainer(5, [Evaluation(Interval(1)), stopping], {2: 0.5}).run()
    assert trainer.iteration == 5
    assert (stopping.best, stopping.best_iteration) == (0.5, 2)


def test_an_evaluation_where_a_run_stops_does_not_count() -> None:
    stopping = EarlyStopping("loss", 2)
    callbacks = [Evaluation(Interval(2)), stopping]
    FakeTrainer(4, callbacks, {2: 1.0, 4: 2.0}).run()
    kept = stopping.state()
    trainer = FakeTrainer(1, callbacks, {1: 0.5})  # ends off the interval, better than ever
    assert trainer.run().evaluated == [1] and stopping.state() == kept
    assert FakeTrainer(3, callbacks, {2: 3.0, 3: 9.0}).run().reason is not None, "the second bad one is that of 2"


def test_accuracy_is_better_when_larger() -> None:
    stopping = EarlyStopping("accuracy", 9)
    for iteration, correct in ((1, 4), (2, 6), (3, 5)):
        stopping.on_evaluate(cast(Trainer, None), EvaluationMetrics(iteration, 1.0, 10, correct))
    assert (stopping.best, stopping.best_iteration, stopping.bad_evaluations) == (0.6, 2, 1)


def test_a_run_that_stopped_early_stays_stopped_unless_the_patience_grows() -> None:
    stopped = EarlyStopping("loss", 2)
    FakeTrainer(9, [Evaluation(Interval(1)), stopped], {1: 1.0, 2: 2.0, 3: 2.0}).run()
    told = "2 evaluations; to go on, give a greater --early-stopping-patience"
    for patience, reason in ((2, told), (3, ""), (0, "")):
        again, trainer = EarlyStopping("loss", patience), FakeTrainer(9, [])
        again.load_state(stopped.state())
        again.on_train_start(cast(Trainer, trainer))
        assert (trainer.reason or "").endswith(reason) and (trainer.reason is None) == (reason == "")


def test_state_goes_on_where_it_was_but_not_for_another_metric() -> None:
    first = EarlyStopping("loss", 2)
    FakeTrainer(2, [Evaluation(Interval(1)), first], {1: 1.0, 2: 2.0}).run()
    again, other = EarlyStopping("loss", 2), EarlyStopping("perplexity", 2)
    again.load_state(first.state())
    other.load_state(first.state())
    assert (again.best, again.bad_evaluations) == (1.0, 1)
    assert other.best is None
    trainer = FakeTrainer(9, [Evaluation(Interval(1)), again], {1: 2.0}).run()
    assert trainer.iteration == 1


def test_the_writer_passes_everything_on_and_closes() -> None:
    told: list[Any] = []

    class Sink:
        def write(self, kind: str, iteration: int, values: dict[str, float]) -> None:
            told.append((kind, iteration, values["loss"]))

        def flush(self) -> None:
            told.append("flush")

        def close(self) -> None:
            told.append("close")

    writer = MetricsWriter([Sink()])
    trainer = FakeTrainer(2, [writer, Evaluation(Interval(2))]).run()
    writer.on_checkpoint(cast(Trainer, trainer), cast(Any, None))
    writer.on_train_end(cast(Trainer, trainer))
    assert told == [("step", 1, 2.0), ("step", 2, 2.0), ("evaluation", 2, 1.0), "flush", "close"]
