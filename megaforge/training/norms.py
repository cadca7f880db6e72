"""``--log-params-norm`` and ``--log-num-zeros-in-grad``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.optim.norms import parameter_norm, zeros_in_gradient
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Norms(Callback):
    """Numbers of all weights and all gradients, each element counted once, at every layout the same."""

    place = Place.BEFORE

    def __init__(self, norm: bool, zeros: bool) -> None:
        self.norm, self.zeros = norm, zeros
        self._zeros = 0.0

    @classmethod
    def of(cls, config: Config) -> Norms | None:
        """What the flags ask for."""
        flags = config.logging
        asked = flags.log_params_norm or flags.log_num_zeros_in_grad
        return cls(flags.log_params_norm, flags.log_num_zeros_in_grad) if asked else None

    def on_gradients(self, trainer: Trainer) -> None:
        if self.zeros:
            self._zeros = zeros_in_gradient(trainer.optimizer.main, trainer.ctx)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.norm:
            metrics.extra["params_norm"] = parameter_norm(trainer.optimizer.main, trainer.ctx)
        if self.zeros:
            metrics.extra["num_zeros"] = self._zeros
