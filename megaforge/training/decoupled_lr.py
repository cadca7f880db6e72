"""``--decoupled-lr``: another learning rate for the embedding and the output head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class DecoupledRate(Callback):
    """The run's schedule between ``--decoupled-lr`` and ``--decoupled-min-lr``, as in Megatron-LM; what multiplies the
    rate of the others multiplies this one."""

    place = Place.BEFORE

    def __init__(self, peak: float, least: float) -> None:
        self.peak, self.least = peak, least

    @classmethod
    def of(cls, config: Config) -> DecoupledRate | None:
        """What the flags ask for."""
        flags: OptimizerConfig = config.optimizer
        if flags.decoupled_lr is None:
            return None
        return cls(flags.decoupled_lr, flags.min_lr if flags.decoupled_min_lr is None else flags.decoupled_min_lr)

    def on_gradients(self, trainer: Trainer) -> None:
        rates = trainer.schedule.between(self.peak, self.least)
        trainer.optimizer.decoupled_lr = rates(trainer.iteration + 1) * math.prod(trainer.lr_factors.values())

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["decoupled_lr"] = trainer.optimizer.decoupled_lr or 0.0
