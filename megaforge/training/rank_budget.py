"""``--peft adalora``: the ranks of a run's adapters shrink while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaforge.parallel.flat_shard import Entry
from megaforge.training.callbacks import Callback, Place
from megaforge.training.triplets import Budget, Orthogonality, Triplets

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class RankBudget(Callback):
    """Adds the penalty that keeps factors orthogonal to the gradients, and after an update chooses the triplets that
    remain, as ``peft``'s ``update_and_allocate`` behind ``optimizer.step``. A step that was left out counts for
    nothing."""

    place = Place.BEFORE
    state_name = "rank_budget"

    def __init__(self, trainer: Trainer) -> None:
        """Collective.

        Raises:
            UserError: on every rank: the run has too few steps.
        """
        flags = self.flags = trainer.config.model
        main, ctx = trainer.optimizer.main, trainer.ctx
        self.triplets = Triplets(trainer.model, main, ctx)
        ranks = self.triplets.ranks
        self.budget = Budget.of(flags, ranks, trainer.config.training.train_iters)
        self.penalty = Orthogonality(trainer.model, main, ctx, flags.adalora_orthogonality, len(ranks))
        self._orthogonality = torch.zeros((), dtype=torch.float64, device=ctx.device)

    def on_gradients(self, trainer: Trainer) -> None:
        trainer.optimizer.wait_for_parameters()
        self._orthogonality = self.penalty.add_gradient(trainer.scaler.scale)
        if trainer.ctx.world.size > 1:
            dist.all_reduce(self._orthogonality, group=trainer.ctx.world.group)

    def on_update(self, trainer: Trainer) -> None:
        step, triplets = trainer.iteration + 1, self.triplets
        if step < self.budget.final:
            triplets.observe(self.flags.adalora_beta1, self.flags.adalora_beta2)
        if chooses := self.budget.chooses(step):
            triplets.choose(self.budget.at(step))
        if chooses or step > self.budget.final:
            trainer.optimizer.wait_for_parameters()
            triplets.drop()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["orthogonality_penalty"] = float(self._orthogonality)
        metrics.extra["adapter_ranks"] = float(self.triplets.kept.sum())

    def tensors(self) -> Iterable[Entry]:
        return self.triplets.entries()
