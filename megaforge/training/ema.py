"""``--ema-decay``: an exponential moving average of the weights, beside those that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from megaforge.config.launcher import print_rank_0
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.main_parameters import MainParameters
from megaforge.parallel.flat_shard import Entry
from megaforge.training.callbacks import Callback, Place
from megaforge.training.other_weights import OtherWeights

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

STATE_NAME = "ema"


class WeightAverage(Callback):
    """``a = decay a + (1 - decay) w`` after each update of the weights, the first of which copies them, as
    ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn``.

    Attributes:
        averages: of each trained parameter, like its master: fp32 (fp64 for fp64 models); under ZeRO this rank's part.
        updates: how many updates are in them.
    """

    place = Place.BEFORE
    state_name = STATE_NAME

    def __init__(self, config: OptimizerConfig, main: MainParameters) -> None:
        self.decay, self.main = config.ema_decay, main
        self._evaluates = config.ema_evaluate
        self._weights = OtherWeights(main)
        self.averages = self._weights.tensors
        self.updates = 0

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.iteration and not self.updates:
            print_rank_0("--ema-decay: there is no average in what was loaded; it begins with the next update")
        if self._evaluates:
            trainer.for_evaluation = self.in_place

    @torch.no_grad()
    def on_update(self, trainer: Trainer) -> None:
        # Of a parameter that other replicas hold there is nothing here.
        masters = [one.master.detach() for one in self.main.trained if one.master.numel()]
        averages = [average for average in self.averages if average.numel()]
        if masters and self.updates:
            torch._foreach_lerp_(averages, masters, 1 - self.decay)
        elif masters:
            torch._foreach_copy_(averages, masters)
        self.updates += 1

    def in_place(self) -> AbstractContextManager[None]:
        """The model computes with the average; afterwards with its own weights again, bit for bit. Before the first
        update there is no average, and nothing changes. Collective under ZeRO."""
        return self._weights.in_place() if self.updates else nullcontext()

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])

    def tensors(self) -> Iterable[Entry]:
        return self._weights.entries()


def average_entries(main: MainParameters) -> list[Entry]:
    """:meth:`MainParameters.entries` by the keys that a checkpoint has the average under; what is not trained has none,
    and keeps its own."""
    trained = {one.spec.name for one in main.trained}
    return [
        (f"callbacks.{STATE_NAME}.{name}" if name in trained else name, declared, tensor)
        for name, declared, tensor in main.entries()
    ]


def has_average(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this ``meta`` keeps an average of at least one update."""
    kept = meta.get("state", {}).get(f"callbacks.{STATE_NAME}", {})
    return bool(kept.get("updates", 0))
