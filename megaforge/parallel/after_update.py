"""What modules do once an optimizer step is done: a router moves its bias, a quantizer renews its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext


@dataclass(frozen=True)
class Update:
    """What there is to know of the step.

    Attributes:
        expert_counts: for each router, [E] assignments of the global batch and [E] choices by plain top-k of its scores
            (:class:`megaforge.nn.moe.RouterLosses`), the same on every rank.
    """

    ctx: ParallelContext
    expert_counts: Mapping[nn.Module, tuple[Tensor, Tensor]]


@runtime_checkable
class AfterUpdate(Protocol):
    """A module that has something to do. Every rank calls it, in module order, so it may communicate."""

    def after_update(self, update: Update) -> None: ...


@torch.no_grad()
def after_update(model: nn.Module, update: Update) -> None:
    """Calls every :class:`AfterUpdate` in ``model``, a model or this rank's stage of it. Call once after each optimizer
    step, on every rank."""
    for module in model.modules():
        if isinstance(module, AfterUpdate):
            module.after_update(update)
