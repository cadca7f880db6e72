"""The reference of a policy all of whose weights are trained: a copy of the weights that the run began with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from megaforge.config.rl_partners import keeps_first_weights
from megaforge.errors import UserError
from megaforge.parallel.flat_shard import Entry
from megaforge.training.callbacks import Callback, Place
from megaforge.training.other_weights import OtherWeights

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class FirstWeights(Callback):
    """Kept where :func:`megaforge.config.rl_partners.keeps_first_weights` says so, as masters are: under ZeRO each rank
    has its part, and checkpoints have the whole. What no rule updates, such as a router's bias, is not part of it."""

    place = Place.BEFORE

    def __init__(self, trainer: Trainer) -> None:
        kept = keeps_first_weights(trainer.config)
        self.weights = OtherWeights.of(trainer) if kept else None
        self.state_name = "first_weights" if kept else None
        self._taken = False

    def on_train_start(self, trainer: Trainer) -> None:
        if self.weights is None or self._taken:
            return
        if trainer.iteration:
            raise UserError(
                f"--rl-kl {trainer.config.rl.rl_kl:g}: the run has gone {trainer.iteration} steps without a reference, "
                "and what it began with is not in its checkpoint; go on with --rl-kl 0, or begin another run with it "
                "(--pretrained-checkpoint)"
            )
        self.weights.take()
        self._taken = True

    def in_place(self) -> AbstractContextManager[None]:
        """The model computes with the first weights. Collective under ZeRO."""
        assert self.weights is not None and self._taken
        return self.weights.in_place()

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._taken = bool(state["taken"])

    def tensors(self) -> Iterable[Entry]:
        return [] if self.weights is None else self.weights.entries()
