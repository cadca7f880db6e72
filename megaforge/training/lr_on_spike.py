"""``--lr-on-spike``: a lower learning rate behind a spike of the loss or of the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.monitor.spikes import RecentSteps
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

REPEAT = 10  # steps after a reduction before the next: the first must show its effect
MOST = 3  # reductions in force at once


class ReduceOnSpike(Callback):
    """After a spike the learning rate is multiplied by ``factor``, and grows back, by an equal ratio a step, to what
    is scheduled in ``window`` steps.

    A spike is a loss or gradient norm far above the last ``window`` of them (:class:`RecentSteps`). What comes within
    :data:`REPEAT` steps of a reduction changes nothing; a later one multiplies by ``factor`` again, down to ``factor``
    to the power of :data:`MOST`, and the way back begins anew. Spikes enter the window, too: a level that stays becomes
    the usual one. Steps that overflowed are not looked at.
    """

    place = Place.BEFORE
    state_name = "spike"

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.recent = factor, RecentSteps(window)
        self.reduced, self.since = 0.0, 0  # reductions in force (a fraction on the way back); steps since the last

    @classmethod
    def of(cls, config: Config) -> ReduceOnSpike | None:
        """What the flags ask for."""
        flags = config.optimizer
        return cls(flags.lr_on_spike, flags.lr_spike_window) if flags.lr_on_spike is not None else None

    def on_step_start(self, trainer: Trainer) -> None:
        # It is not a part of the trainer's factors between steps: without this flag nothing would let it fade.
        trainer.lr_factors["spike"] = self.factor**self.reduced if self.reduced else 1.0

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        values = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        metrics.extra["spike"], metrics.extra["spike_lr_factor"] = 0.0, trainer.lr_factors.pop("spike", 1.0)
        self._release()
        if not all(map(math.isfinite, values.values())):
            return
        if spikes := self.recent.spikes(values):
            metrics.extra["spike"] = 1.0
            self._reduce(metrics.iteration, spikes[0], values[spikes[0]])
        self.recent.enter(values)

    def _release(self) -> None:
        """One step of the way back."""
        if self.reduced:
            self.since += 1
            left = self.recent.window - self.since + 1
            self.reduced = self.reduced * (left - 1) / left if left > 1 else 0.0

    def _reduce(self, iteration: int, name: str, value: float) -> None:
        if self.reduced and self.since <= REPEAT:
            return
        self.reduced, self.since = min(self.reduced + 1, MOST), 0
        known = self.recent.seen[name]
        print_rank_0(
            f"iteration {iteration}: {name} spikes to {value:.4g} (the median of {len(known)} steps is "
            f"{median(known):.4g}): the learning rate is multiplied by {self.factor**self.reduced:.3g}, "
            f"which fades in {self.recent.window} steps"
        )

    def state(self) -> dict[str, Any]:
        return {"seen": self.recent.seen, "reduced": self.reduced, "since": self.since}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent.load(state["seen"])
        self.reduced, self.since = state["reduced"], state["since"]
