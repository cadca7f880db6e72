"""Flags of Mixture of Depths (Raposo et al., arXiv 2404.02258): blocks that a part of the tokens goes through. They say
what the model computes, so they are a part of its own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class DepthConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of Mixture of Depths."""

    mod_capacity_factor: float | None = flag(
        None,
        "Mixture of Depths: share of each sequence's tokens that go through a block; the others pass it by (default: "
        "every token goes through every block)",
        above=0,
        most=1,
    )
    mod_every: int = flag(
        2, "every Nth block is one of --mod-capacity-factor; 1: all but the first, which every token needs", least=1
    )
    mod_inference: str = flag(
        "predictor",
        "who chooses the tokens where later ones are not known: a small network that is trained beside, or the router, "
        "trained so that it scores chosen tokens above 0",
        choices=("predictor", "threshold"),
    )
    mod_loss_coeff: float = flag(
        1e-2, "weight of the loss by which --mod-inference learns what the capacity would choose", above=0
    )

    def capacity_of(self, block: int) -> float | None:
        """The share of the tokens that go through a block by its place; None: all, without a choice."""
        chooses = block > 0 and (block + 1) % self.mod_every == 0
        return self.mod_capacity_factor if chooses else None


def tokens_within(capacity: float, length: int) -> int:
    """How many of ``length`` tokens go through a block of this capacity: rounded up, at least one."""
    return max(1, math.ceil(round(capacity * length, 6)))
