"""Flags of distillation: what a model learns from a trained one besides the text."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher (--objective distillation): its scores, and relations of its queries, keys and values."""

    distill_from: str | None = flag(
        None, "with --objective distillation: checkpoint of the teacher, or a run's --save directory", metavar="DIR"
    )
    distill_weight: float = flag(
        1.0, "with --distill-from: weight of the divergence from the teacher's scores, times temperature^2", least=0
    )
    distill_temperature: float = flag(
        1.0, "with --distill-from: both models' scores are divided by it before they are compared", above=0, most=1000
    )
    distill_label_weight: float = flag(1.0, "with --distill-from: weight of the cross-entropy of labels", least=0)
    distill_relation_weight: float = flag(
        0.0,
        "with --distill-from: weight of the divergence of attention relations, of queries with queries, keys with keys "
        "and values with values (0: they are not compared)",
        least=0,
    )
    distill_relation_layer: int | None = flag(
        None, "with --distill-relation-weight: the block whose mixer is compared, from 0; by default the last", least=0
    )

    def validate(self) -> None:
        """The fields' bounds are all there is to check."""
