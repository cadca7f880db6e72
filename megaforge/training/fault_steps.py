"""Where a step passes the points at which a plan of faults may strike (:mod:`megaforge.resilience.faults`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.fault_points import armed, reach
from megaforge.training.callbacks import Callback

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class FaultSteps(Callback):
    """Reaches ``step`` and ``gradients``."""

    @classmethod
    def of(cls, config: Config) -> FaultSteps | None:
        """None where no plan is armed."""
        return cls() if armed() else None

    def on_step_start(self, trainer: Trainer) -> None:
        reach("step", iteration=trainer.iteration + 1, model=trainer.model)

    def on_gradients(self, trainer: Trainer) -> None:
        reach("gradients", iteration=trainer.iteration + 1, model=trainer.model)
