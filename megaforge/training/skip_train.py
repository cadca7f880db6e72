"""``--skip-train``: an evaluation of what was loaded, and no step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.training.callbacks import Callback
from megaforge.training.final_test import FinalTest

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class SkipTrain(Callback):
    """Evaluates once, and tests where ``--eval-test`` asks for it, before the first step, and ends the run."""

    @classmethod
    def of(cls, config: Config) -> SkipTrain | None:
        """What the flags ask for."""
        return cls() if config.training.skip_train else None

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.stop_reason is None:
            trainer.stop("--skip-train")
            trainer.evaluate(due=False)
            for test in (one for one in trainer.callbacks if isinstance(one, FinalTest)):
                test.measure(trainer)
