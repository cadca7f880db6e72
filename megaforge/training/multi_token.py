"""What multi-token prediction (``--mtp-num-layers``) asks of batches: later labels, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import ahead_of
from megaforge.data.loader import Batch

if TYPE_CHECKING:
    from megaforge.training.objectives import Objective
    from megaforge.training.trainer import Trainer


def targets_ahead(batch: Batch, cfg: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    """Labels int64 [b, s] and loss mask [b, s] of each further prediction, in host memory. Where documents do not see
    each other no label counts that lies in another document than its token. Nothing where the batch, as one of an
    evaluation, does not look so far ahead."""
    wanted = len(ahead_of(cfg))
    if len(batch.later) < wanted:
        return []
    pairs = zip(batch.later[:wanted], batch.same_document, strict=False)
    within = cfg.reset_at_document_boundaries
    return [(labels, mask * same if within else mask) for (labels, mask), same in pairs]


def as_read(trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
    """The experience of an objective that learns from what is read."""
    return batches


class PredictsAhead:
    """An objective of a model that predicts further tokens: it looks as far ahead, and counts their labels. Their loss
    terms are the model's own."""

    def __init__(self, objective: Objective, cfg: ModelConfig) -> None:
        self.look_ahead = max(objective.look_ahead, 1 + len(ahead_of(cfg)))
        self.takes_loss_sum = getattr(objective, "takes_loss_sum", False)
        self.prepare = getattr(objective, "prepare", lambda *run: None)
        self.terms = objective.terms
        self.experience = getattr(objective, "experience", as_read)
        self.callbacks: tuple[str, ...] = getattr(objective, "callbacks", ())
        self.plays = getattr(objective, "plays", False)
        self._objective, self._cfg = objective, cfg

    def counts(self, batch: Batch) -> dict[str, float]:
        masks = [mask for _, mask in targets_ahead(batch, self._cfg)]
        own = {f"mtp_labels/{n}": float(mask.sum(dtype=torch.float64)) for n, mask in enumerate(masks, start=1)}
        return self._objective.counts(batch) | own
