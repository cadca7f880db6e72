"""Flags of plastic adapters. They say what the model computes, so they are a part of its own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.registry import PLASTIC_RULES


@dataclass(frozen=True)
class PlasticConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of fast weights."""

    plastic_rank: int = flag(8, "--peft plastic: rank of each adapter", least=1, most=1 << 16)
    plastic_alpha: float = flag(0.2, "--peft plastic: factor on what is read of fast weights", above=0)
    plastic_rule: str = flag("hebb", "--peft plastic: how fast weights change", choices=PLASTIC_RULES)
    plastic_rate: float = flag(1.0, "--peft plastic: factor on each change of fast weights", above=0)
    plastic_decay: float = flag(0.98, "--peft plastic: what is left of fast weights after each change", least=0, most=1)
    plastic_clamp: float = flag(2.0, "--peft plastic: fast weights are read within plus and minus this", above=0)
    plastic_chunk: int = flag(
        64, "--peft plastic: fast weights change every so many tokens of a document", least=1, most=1 << 24
    )
    plastic_correlation: float = flag(
        0.0,
        "--peft plastic: weight of the correlation objective: what is read of fast weights is to go with what the "
        "layer gives",
        least=0,
    )
