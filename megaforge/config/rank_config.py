"""Flags that choose the ranks of adapters by the gradients of the base."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class RankConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of it."""

    lora_rank_steps: int = flag(
        0,
        "--peft lora, qlora: choose each adapter's rank, up to --lora-rank, by the gradient of its matrix over so many "
        "steps of the base (0: do not)",
        least=0,
    )
    lora_rank_energy: float = flag(
        0.9, "--lora-rank-steps: share of a gradient's squared norm that a rank has to hold", above=0, most=1
    )
