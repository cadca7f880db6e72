"""What modules do once an optimizer step is done: a router moves its bias, a quantizer renews its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

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


class AfterUpdate(Protocol):
    """What a class of modules declares that has something to do.

    Every rank calls it, in module order, so it may communicate. Under ZeRO trained parameters may still be arriving:
    what depends on them is computed when the module is next called.
    """

    def after_update(self, update: Update) -> None: ...


@torch.no_grad()
def after_update(model: nn.Module, update: Update) -> None:
    """Calls every :class:`AfterUpdate` in ``model``, a model or this rank's stage of it. Call once after each optimizer
    step, on every rank."""
    for module in model.modules():
        if hasattr(type(module), "after_update"):  # of the class: modules are slow to say that they lack something
            cast(AfterUpdate, module).after_update(update)
