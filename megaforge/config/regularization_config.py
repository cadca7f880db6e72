"""Flags of what is added to the loss that a run minimises, or to its gradient. What is reported as the loss stays the
cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class RegularizationConfig:
    """Further losses, and penalties of weights."""

    label_smoothing: float = flag(
        0.0, "share of each label's probability that goes to the whole vocabulary evenly", least=0, below=1
    )
    contrastive_weight: float = flag(
        0.0,
        "weight of the contrast of sequences (InfoNCE): a sequence's first half must be nearer to its second than to "
        "those of the others in its micro-batch",
        least=0,
    )
    contrastive_temperature: float = flag(
        0.1, "with --contrastive-weight: similarities (cosines) are divided by it", above=0, most=1000
    )
    l1_coeff: float = flag(0.0, "L1 penalty: times the sum of weights' absolute values", least=0)
    l2_coeff: float = flag(
        0.0,
        "L2 penalty: times half the sum of weights' squares; unlike --weight-decay it goes through the optimizer",
        least=0,
    )

    def validate(self) -> None:
        """The fields' bounds are all there is to check."""

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Those of :data:`megaforge.registry.LOSS_TERMS` that the flags ask for."""
        asked = {"label_smoothing": self.label_smoothing, "contrastive": self.contrastive_weight}
        return tuple(name for name, weight in asked.items() if weight)
