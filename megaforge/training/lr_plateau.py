"""``--lr-decay-style plateau``: the learning rate falls where evaluations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megaforge.config.launcher import print_rank_0
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import EvaluationMetrics, StepMetrics
    from megaforge.training.trainer import Trainer


class ReduceOnPlateau(Callback):
    """Multiplies the learning rate by ``--lr-plateau-factor`` after more than ``--lr-plateau-patience`` evaluations in
    a row whose loss is not below (1 - ``--lr-plateau-threshold``) times the best; never below ``--min-lr``. It is the
    rule of :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`. An evaluation between those of ``--eval-interval``,
    where a run ends for now, does not count: one that goes on has the rates of one that never stopped."""

    place = Place.JUDGE
    state_name = "plateau"

    def __init__(self) -> None:
        self.best: float | None = None
        self.bad_evaluations = 0
        self.factor = 1.0

    def on_train_start(self, trainer: Trainer) -> None:
        self.factor = trainer.lr_factors.pop("plateau", self.factor)  # where older checkpoints keep it
        if self.factor < 1:
            print_rank_0(f"the learning rate goes on multiplied by {self.factor:g} (plateau)")

    def on_step_start(self, trainer: Trainer) -> None:
        trainer.lr_factors["plateau"] = self.factor

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        # It is not a part of the trainer's factors between steps: a run that goes on without plateaus is at the
        # scheduled rate.
        trainer.lr_factors.pop("plateau", None)

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        if not metrics.due:
            return
        flags = trainer.config.optimizer
        best = math.inf if self.best is None else self.best
        if metrics.loss < best * (1 - flags.lr_plateau_threshold):  # not where it is nan
            self.best, self.bad_evaluations = metrics.loss, 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations <= flags.lr_plateau_patience:
            return
        self.bad_evaluations = 0
        factor = max(self.factor * flags.lr_plateau_factor, flags.min_lr / flags.lr)
        if factor < self.factor:
            self.factor = factor
            print_rank_0(
                f"the evaluation loss {metrics.loss:.5g} is no better than {best:.5g}: from iteration "
                f"{metrics.iteration + 1} on, the learning rate is multiplied by {factor:g}"
            )

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "bad_evaluations": self.bad_evaluations, "factor": self.factor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.bad_evaluations = state["best"], state["bad_evaluations"]
        self.factor = state.get("factor", self.factor)


def reduce_on_plateau(trainer: Trainer) -> Callback:
    """The callback by its name in the registry."""
    return ReduceOnPlateau()
