"""What a training step minimises: a model's per-token outputs become named loss terms.

``--objective NAME`` chooses an objective, and ``--loss-terms NAME`` adds terms to it; a file of one's own that
registers some in :data:`megaforge.registry.OBJECTIVES` or :data:`megaforge.registry.LOSS_TERMS` is named by
``--extensions``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from megaforge.config.config import Config
from megaforge.config.pattern import ahead_of
from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.parallel.context import ParallelContext
from megaforge.registry import LOSS_TERMS, OBJECTIVES
from megaforge.training.multi_token import PredictsAhead, as_read
from megaforge.training.token_metrics import summed, token_metrics

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class Objective(Protocol):
    """What is trained for. It is made from the run's configuration, once on each rank.

    Attributes:
        look_ahead: how many tokens after each one it needs to know: 1 is the label alone; with n, ``batch.later`` has
            the labels and loss masks of the second to the n-th.
        takes_loss_sum: whether the cross-entropies of labels enter its terms as ``output.loss_sum``, whose gradients
            cost a product with the vocabulary's matrix less.
        plays: whether samples are numbers alone, of which it makes what is learnt from (:meth:`experience`).
        callbacks: names of those in :data:`megaforge.registry.CALLBACKS` that it comes with.
    """

    look_ahead: int = 1
    takes_loss_sum: bool = False
    plays: bool = False
    callbacks: tuple[str, ...] = ()

    def counts(self, batch: Batch) -> dict[str, float]:
        """What this micro-batch adds to the counts that terms are divided by, under the same names for every
        micro-batch; they are summed over the global batch before its first forward pass."""

    def prepare(self, config: Config, model: nn.Module, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> None:
        """The run is built, and its checkpoint is loaded: what else the objective needs is fetched. Collective.

        Args:
            model: this rank's stages.
            tokenizer: its identity as checkpoints keep it.
        """

    def experience(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        """What a step learns from, made of this rank's micro-batches as they were read: as many of them, all of one
        shape. Called before each step; collective. By default they are what is learnt from."""
        return batches

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        """The loss terms of a micro-batch, under the same names each time; ``loss`` is the one that runs report first.

        Called on the ranks that have the model's head, under autograd.

        Args:
            output: of this rank's tokens.
            batch: the whole micro-batch, in host memory.
        """


class NextToken(Objective):
    """Cross-entropy of every label that counts (``--objective next_token``)."""

    look_ahead = 1
    takes_loss_sum = True

    def __init__(self, config: Config) -> None:
        """Needs nothing of the configuration."""

    def prepare(self, config: Config, model: nn.Module, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> None:
        """Needs nothing of the run."""

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"labels": float(batch.loss_mask.sum(dtype=torch.float64))}

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        return {"loss": LossTerm(output.loss_sum, "labels")}


class Predictions(NextToken):
    """What an evaluation sums: nats, right predictions, the labels themselves, and metrics of ``--evaluation-metrics``
    under names that begin with :attr:`OWN`."""

    OWN = "metric/"

    def __init__(self, config: Config) -> None:
        self._more = token_metrics(config)

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        sums = {"loss": output.loss_sum, "correct": output.correct, "labels": output.mask_SB.sum(dtype=torch.float64)}
        sums |= {self.OWN + name: summed(metric, output, name) for name, metric in self._more.items()}
        return {name: LossTerm(value, "labels") for name, value in sums.items()}


class WithTerms:
    """An objective and further terms."""

    def __init__(self, objective: Objective, more: Mapping[str, Callable[[ModelOutput], LossTerm]]) -> None:
        self.counts, self.look_ahead = objective.counts, objective.look_ahead
        self.takes_loss_sum = getattr(objective, "takes_loss_sum", False)
        self.prepare = getattr(objective, "prepare", lambda *run: None)
        self.experience = getattr(objective, "experience", as_read)
        self.callbacks: tuple[str, ...] = getattr(objective, "callbacks", ())
        self.plays = getattr(objective, "plays", False)
        self._objective, self._more = objective, more

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        own = self._objective.terms(output, batch)
        if twice := own.keys() & self._more.keys():
            raise UserError(f"--loss-terms {min(twice)}: the objective has a term of this name; register it as another")
        return own | {name: term(output) for name, term in self._more.items()}


def make_objective(config: Config) -> Objective:
    """The objective of ``--objective``, with the terms of ``--loss-terms``: both are registered as what makes them from
    the configuration; a term is a function of a micro-batch's output."""
    objective: Objective = OBJECTIVES.get(config.training.objective)(config)
    names = dict.fromkeys((*config.training.loss_terms, *config.regularization.loss_terms))
    more = {name: LOSS_TERMS.get(name)(config) for name in names}
    objective = WithTerms(objective, more) if more else objective
    return PredictsAhead(objective, config.model) if ahead_of(config.model) else objective
