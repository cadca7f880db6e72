"""The value of ``--l1-coeff`` and ``--l2-coeff``'s penalties, beside the loss that they are no part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.config.regularization_config import RegularizationConfig
from megaforge.optim.penalty import penalties
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Penalties(Callback):
    """Those of the weights that the step's gradient is of, at every layout the same."""

    place = Place.BEFORE

    def __init__(self, flags: RegularizationConfig) -> None:
        self.flags = flags
        self._found: dict[str, float] = {}

    @classmethod
    def of(cls, config: Config) -> Penalties | None:
        """What the flags ask for."""
        flags = config.regularization
        return cls(flags) if flags.l1_coeff or flags.l2_coeff else None

    def on_gradients(self, trainer: Trainer) -> None:
        self._found = penalties(self.flags, trainer.optimizer.main, trainer.ctx)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra.update(self._found)
