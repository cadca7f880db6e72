"""What happens around the train step: evaluation, early stopping, checkpoints, metric sinks.

Callbacks run by their :class:`Place` after every step, however they were added: the step's numbers are made whole, then
recorded and shown, then the model is judged, then saved, so that a checkpoint holds its own iteration's verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megaforge.checkpoint.after_publish import after_publish
from megaforge.checkpoint.directory import KEEP_ALL, Retention
from megaforge.monitor.sinks import MetricSink
from megaforge.parallel.flat_shard import Entry
from megaforge.training.intervals import Interval

if TYPE_CHECKING:
    from megaforge.training.metrics import EvaluationMetrics, StepMetrics
    from megaforge.training.trainer import Trainer

LARGER_IS_BETTER = frozenset({"accuracy"})


class Place(IntEnum):
    """When a callback's turn comes."""

    BEFORE = 0  # adds to the step's numbers, or decides that this step is the last: all others must know
    RECORD = 1
    SHOW = 2
    JUDGE = 3  # may end the run too
    SAVE = 4
    AFTER = 5


class Callback:
    """Hooks of a run; each does nothing unless overridden. All ranks call them in the same order.

    A callback with state of its own gives it a name under which checkpoints keep it.
    """

    place: Place = Place.AFTER
    state_name: str | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """The state is loaded, the first step is about to run."""

    def on_step_start(self, trainer: Trainer) -> None:
        """A batch is there, and step ``trainer.iteration + 1`` is about to run; ``trainer.lr_factors`` may be set.
        Called again where the step is begun anew."""

    def on_backward(self, trainer: Trainer) -> None:
        """This rank's micro-batches are through; their gradient is not summed over replicas yet (part of it may be on
        its way)."""

    def on_gradients(self, trainer: Trainer) -> None:
        """The ``main_grad`` of every parameter is summed over the global batch, not clipped, and still multiplied by
        ``trainer.scaler.scale``."""

    def on_update(self, trainer: Trainer) -> None:
        """The optimizer has updated the weights; not after a step that overflowed."""

    def on_numbers(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """The newest step's numbers are there; it may still be undone (``trainer.rollback.asked``: why)."""

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """An optimizer step is done; ``trainer.finished`` says whether it was the last. ``metrics.extra`` takes numbers
        of one's own: before ``Place.RECORD``, they are recorded too."""

    def on_rollback(self, trainer: Trainer) -> None:
        """The newest step was undone, with those before it: the run stands where ``trainer.iteration`` says. States
        (:meth:`state`, :meth:`tensors`) are what they were then."""

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        """The model was evaluated after ``trainer.iteration``."""

    def on_test(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        """The model was measured on the test samples (``--eval-test``)."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """The run's state after ``trainer.saved_iteration`` was published as ``path``: this iteration's, or with
        ``--async-save`` an earlier one's."""

    def on_train_end(self, trainer: Trainer) -> None:
        """The loop is over, by its end or by an exception."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for this callback to go on (JSON)."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state` gave."""

    def tensors(self) -> Iterable[Entry]:
        """What a checkpoint must hold in tensors, as (key, declaration, this rank's part): see
        :class:`megaforge.checkpoint.shards.TensorEntry`. They are filled in place, after :meth:`load_state`."""
        return ()


C = TypeVar("C", bound=Callback)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """``callbacks`` by their place; those of one place as they came."""
    return sorted(callbacks, key=lambda callback: callback.place)


def callback_of(callbacks: Iterable[Callback], kind: type[C]) -> C:
    """The first of that kind, which must be there."""
    return next(one for one in callbacks if isinstance(one, kind))


class MetricsWriter(Callback):
    """Hands every step and evaluation to the sinks; lives on the first rank."""

    place = Place.RECORD

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self.sinks = list(sinks)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        for sink in self.sinks:
            sink.write("step", metrics.iteration, metrics.values())

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        for sink in self.sinks:
            sink.write("evaluation", metrics.iteration, metrics.values())

    def on_test(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        for sink in self.sinks:
            sink.write("test", metrics.iteration, metrics.values())
            sink.flush()

    def on_rollback(self, trainer: Trainer) -> None:
        for sink in self.sinks:
            if (go_back := getattr(sink, "go_back", None)) is not None:
                go_back(trainer.iteration)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        for sink in self.sinks:
            sink.flush()

    def on_train_end(self, trainer: Trainer) -> None:
        for sink in self.sinks:
            sink.close()


class Evaluation(Callback):
    """Evaluates at each ``interval`` and after the last iteration. A run that was asked to end does not evaluate, as
    whoever asked may not wait; one that was asked in its last iteration does so once it is saved."""

    place = Place.JUDGE

    def __init__(self, interval: Interval) -> None:
        self.interval = interval

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        due = self.interval.is_due(trainer)
        if due or (trainer.finished and not trainer.interrupted):
            trainer.evaluate(due)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        evaluated = trainer.last_evaluation is not None and trainer.last_evaluation.iteration == trainer.iteration
        last = trainer.iteration >= trainer.config.training.train_iters and trainer.saved_iteration == trainer.iteration
        if trainer.interrupted and last and not evaluated:
            trainer.evaluate(due=False)


class EarlyStopping(Callback):
    """Watches one evaluation metric: remembers the best, and ends the run after ``patience`` evaluations without a
    better one (0: never ends it). Evaluations between those of ``--eval-interval``, where a run ends for now, do not
    count: one that goes on stops where one that never stopped does."""

    place = Place.JUDGE
    state_name = "early_stopping"

    def __init__(self, metric: str, patience: int) -> None:
        self.metric = metric
        self.patience = patience
        self.best: float | None = None
        self.best_iteration = 0
        self.bad_evaluations = 0

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        if not metrics.due:
            return
        value = float(metrics.values()[self.metric])
        if not math.isnan(value) and self._better(value):
            self.best, self.best_iteration, self.bad_evaluations = value, metrics.iteration, 0
            return
        self.bad_evaluations += 1
        if self._over():
            trainer.stop(self._reason())

    def on_train_start(self, trainer: Trainer) -> None:
        """A run that has ended here before is not started again by the same line."""
        if self._over():
            trainer.stop(f"{self._reason()}; to go on, give a greater --early-stopping-patience")

    def _over(self) -> bool:
        return 0 < self.patience <= self.bad_evaluations

    def _reason(self) -> str:
        best = "nan" if self.best is None else f"{self.best:.5g}"
        return (
            f"{self.metric} did not improve on {best} (iteration {self.best_iteration}) in "
            f"{self.bad_evaluations} evaluations"
        )

    def _better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value > self.best if self.metric in LARGER_IS_BETTER else value < self.best

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "bad_evaluations": self.bad_evaluations,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        # The best value of another metric says nothing about this one.
        if state.get("metric") == self.metric:
            self.best = state["best"]
            self.best_iteration = state["best_iteration"]
            self.bad_evaluations = state["bad_evaluations"]


class Checkpointing(Callback):
    """Saves at each ``interval``, when the time asks for it, and after the last iteration.

    What is published lets older checkpoints go, all but those that ``keep`` names.
    """

    place = Place.SAVE

    def __init__(self, interval: Interval, keep: Retention = KEEP_ALL) -> None:
        self.interval, self.keep = interval, keep

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.save_written:
            trainer.settle_save()
        if trainer.finished or trainer.save_due or self.interval.is_due(trainer):
            trainer.save()

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        if not trainer.in_background(path):  # which has let the older ones go
            after_publish(path, trainer.ctx, self.keep, trainer.replica, trainer.events)

    def on_train_end(self, trainer: Trainer) -> None:
        """After an exception a checkpoint may still be on its way."""
        if trainer.background is not None:
            trainer.background.finish()


class ExitInterval(Callback):
    """Ends the run at each ``interval``: for queues that grant little time at once. ``asked`` is how it was asked for:
    the flag and its value."""

    place = Place.BEFORE

    def __init__(self, interval: Interval, asked: str) -> None:
        self.interval, self.asked = interval, asked

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.interval.is_due(trainer) and not trainer.finished:
            trainer.paused = True
            trainer.stop(self.asked)
