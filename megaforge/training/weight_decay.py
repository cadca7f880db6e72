"""``--weight-decay-incr-style``: weight decay that grows over the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class GrowingDecay(Callback):
    """From ``--start-weight-decay`` to ``--end-weight-decay``, which step ``--train-iters`` has, in a line or half a
    cosine (Megatron-LM's ``get_wd``; a step counts itself, as the learning rate's schedule does here)."""

    place = Place.BEFORE

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @classmethod
    def of(cls, config: Config) -> GrowingDecay | None:
        """What the flags ask for."""
        return None if config.optimizer.weight_decay_incr_style == "constant" else cls(config.optimizer)

    def at(self, step: int, train_iters: int) -> float:
        """The weight decay of a step, from 1, of a run of ``train_iters``."""
        start, end = self.config.start_weight_decay or 0.0, self.config.end_weight_decay or 0.0
        share = min(1.0, step / max(1, train_iters))
        if self.config.weight_decay_incr_style == "cosine":
            share = 0.5 * (math.cos(math.pi * (1 - share)) + 1)
        return start + share * (end - start)

    def on_step_start(self, trainer: Trainer) -> None:
        now = self.at(trainer.iteration + 1, trainer.config.training.train_iters)
        trainer.optimizer.decay_factor = now / self.config.weight_decay

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["weight_decay"] = self.at(trainer.iteration, trainer.config.training.train_iters)
