"""Training in two stages, as networks of 1-bit weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class SecondStage(Callback):
    """From one iteration on another learning rate and another weight decay: BitNet b1.58 is trained at 1.5e-3 with a
    decay of 0.1 for half of the run, then at 1e-3 without (microsoft/unilm, bitnet/The-Era-of-1-bit-LLMs__Training_Tips
    _Code_FAQ.pdf).

    A run that continues with other lengths keeps a second stage that has begun.
    """

    place = Place.BEFORE
    state_name = "second_stage"

    def __init__(self, share: float, lr_factor: float, decay_factor: float) -> None:
        """``share``: of the run's iterations, that of the first stage."""
        self.share, self.lr_factor, self.decay_factor = share, lr_factor, decay_factor
        self.last_of_first = 0
        self._was: int | None = None

    @classmethod
    def of(cls, config: Config) -> SecondStage | None:
        """What the flags ask for."""
        flags = config.optimizer
        if flags.second_stage_at is None:
            return None
        return cls(flags.second_stage_at, flags.second_stage_lr_factor, flags.second_stage_weight_decay_factor)

    def on_train_start(self, trainer: Trainer) -> None:
        self.last_of_first = round(self.share * trainer.config.training.train_iters)
        if self._was is not None and self._was <= trainer.iteration and self._was != self.last_of_first:
            print_rank_0(f"the second stage began after iteration {self._was}, and goes on")
            self.last_of_first = self._was

    def on_step_start(self, trainer: Trainer) -> None:
        second = trainer.iteration >= self.last_of_first
        if trainer.iteration == self.last_of_first:
            print_rank_0(
                f"the second stage begins: learning rate times {self.lr_factor:g}, weight decay times "
                f"{self.decay_factor:g}"
            )
        trainer.lr_factors["second_stage"] = self.lr_factor if second else 1.0
        trainer.optimizer.decay_factor = self.decay_factor if second else 1.0

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        # Like the decay's, it is set anew in each step: a run that goes on without a second stage has neither.
        trainer.lr_factors.pop("second_stage", None)
        metrics.extra["weight_decay_factor"] = trainer.optimizer.decay_factor

    def state(self) -> dict[str, Any]:
        return {"last_of_first": self.last_of_first}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._was = int(state["last_of_first"])
