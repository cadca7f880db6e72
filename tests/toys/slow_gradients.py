"""A toy callback: adds the gradients' slow average to them (Grokfast, Lee et al., arXiv 2405.20233), and halves the
learning rate every second step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megaforge.parallel.flat_shard import Entry, optimizer_shard
from megaforge.parallel.param_spec import named_specs
from megaforge.registry import CALLBACKS
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer

DECAY, FACTOR = 0.5, 4.0


class SlowGradients(Callback):
    """Works on whatever part of a gradient this rank holds."""

    place = Place.BEFORE
    state_name = "slow_gradients"

    def __init__(self, trainer: Trainer) -> None:
        self.trained = [(spec.name, p) for spec, p in named_specs(trainer.model) if p.requires_grad]
        self.averages = {name: torch.zeros_like(p.main_grad) for name, p in self.trained}  # type: ignore[attr-defined]

    def on_gradients(self, trainer: Trainer) -> None:
        for name, parameter in self.trained:
            gradient = parameter.main_grad  # type: ignore[attr-defined]
            gradient.add_(self.averages[name].lerp_(gradient, 1 - DECAY), alpha=FACTOR)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["halvings"] = trainer.iteration // 2
        if trainer.iteration % 2 == 0:
            trainer.lr_factors["halving"] = trainer.lr_factors.get("halving", 1.0) / 2

    def tensors(self) -> Iterable[Entry]:
        return [(name, optimizer_shard(parameter), self.averages[name]) for name, parameter in self.trained]


CALLBACKS.register("slow_gradients", SlowGradients)
