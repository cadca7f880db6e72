"""``--plateau-boost``: a higher learning rate while the loss stands still."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

RISE = 0.05  # above the loss at which a boost began, as a share of it: the boost does harm


class PlateauBoost(Callback):
    """Multiplies the learning rate by ``--plateau-boost-factor`` while the training loss stands still.

    The loss is looked at once an interval (``--plateau-boost-interval`` iterations), as the mean over it; its
    improvement is relative to the mean of the interval before.

    - A boost begins where the improvement is below ``--plateau-boost-trigger``.
    - It ends where the improvement reaches the trigger again, where the mean is more than 5% above what it was when the
      boost began, or after ``--plateau-boost-intervals`` intervals. The rate is then exactly the scheduled one.
    - After one that did not help (the last two ends) the next may only begin once an interval has reached the trigger
      by itself: a run that has converged does not go on and off for ever.

    A loss that is not finite is left out of its mean; an interval without any changes nothing.
    """

    place = Place.BEFORE
    state_name = "plateau_boost"

    def __init__(self, config: OptimizerConfig) -> None:
        self.factor, self.interval = config.plateau_boost_factor, config.plateau_boost_interval
        self.trigger, self.longest = config.plateau_boost_trigger, config.plateau_boost_intervals
        self._sum, self._losses = 0.0, 0
        self._before: float | None = None
        self._began_at: float | None = None
        self._intervals = 0
        self._armed = True

    @property
    def boosting(self) -> bool:
        """Whether the next step's rate is the higher one."""
        return self._began_at is not None

    @classmethod
    def of(cls, config: Config) -> PlateauBoost | None:
        """What the flags ask for."""
        flags = config.optimizer
        return cls(flags) if flags.plateau_boost else None

    def on_step_start(self, trainer: Trainer) -> None:
        # It is not a part of the trainer's factors between steps: a checkpoint that is continued without this flag goes
        # on at the scheduled rate.
        if self.boosting:
            trainer.lr_factors[self.state_name or ""] = self.factor

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["lr_boost"] = trainer.lr_factors.pop(self.state_name or "", 1.0)
        if math.isfinite(metrics.loss):
            self._sum, self._losses = self._sum + metrics.loss, self._losses + 1
        if metrics.iteration % self.interval or not self._losses:
            return
        mean, self._sum, self._losses = self._sum / self._losses, 0.0, 0
        before, self._before = self._before, mean
        if before is not None:
            improvement = (before - mean) / abs(before) if before else 0.0
            metrics.extra["plateau_improvement"] = improvement
            self._judge(metrics.iteration, mean, improvement)

    def _judge(self, iteration: int, mean: float, improvement: float) -> None:
        improves = improvement >= self.trigger
        if self._began_at is None:
            self._armed = self._armed or improves
            if self._armed and not improves:
                self._began_at, self._intervals = mean, 0
                _say(iteration, f"the loss ({mean:.5g}) improved by {improvement:.2%}: learning rate x {self.factor:g}")
            return
        self._intervals += 1
        end = None
        if improves:
            end = f"the loss improved by {improvement:.2%}"
        elif mean - self._began_at > RISE * abs(self._began_at):
            end = f"the loss rose from {self._began_at:.5g} to {mean:.5g}"
        elif self._intervals >= self.longest:
            end = f"{self._intervals} intervals are over"
        if end is not None:
            self._began_at, self._armed = None, improves
            _say(iteration, f"{end}: the learning rate is the scheduled one again")

    def state(self) -> dict[str, Any]:
        return {
            "sum": self._sum,
            "losses": self._losses,
            "before": self._before,
            "began_at": self._began_at,
            "intervals": self._intervals,
            "armed": self._armed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sum, self._losses, self._before = state["sum"], state["losses"], state["before"]
        self._began_at, self._intervals, self._armed = state["began_at"], state["intervals"], state["armed"]


def _say(iteration: int, text: str) -> None:
    print_rank_0(f"--plateau-boost: iteration {iteration}: {text}")
