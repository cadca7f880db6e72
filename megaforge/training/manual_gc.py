"""``--manual-gc``: Python's garbage is collected on all ranks at once, so that none waits for another's collection."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.training.callbacks import Callback

if TYPE_CHECKING:
    from megaforge.training.metrics import EvaluationMetrics, StepMetrics
    from megaforge.training.trainer import Trainer


class ManualCollection(Callback):
    """Collects at the start, every ``interval`` iterations (0: not) and after evaluations; otherwise never, as in
    Megatron-LM. When the run is over, collections are automatic again."""

    def __init__(self, interval: int, with_evaluations: bool) -> None:
        self.interval, self.with_evaluations = interval, with_evaluations

    @classmethod
    def of(cls, config: Config) -> ManualCollection | None:
        """What the flags ask for."""
        flags = config.training
        return cls(flags.manual_gc_interval, flags.manual_gc_eval) if flags.manual_gc else None

    def on_train_start(self, trainer: Trainer) -> None:
        gc.disable()
        gc.collect()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.interval and trainer.iteration % self.interval == 0:
            gc.collect()

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        if self.with_evaluations:
            gc.collect()

    def on_train_end(self, trainer: Trainer) -> None:
        gc.enable()
