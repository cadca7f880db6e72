"""A model's layers that have experts: how they are called, and what is to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of, expert_layers


@dataclass(frozen=True)
class ExpertLayers:
    """A model's layers that have experts, in order; those of further predictions are behind the model's.

    Attributes:
        names: as checkpoints have them: ``3.ffn`` is that of the fourth block, ``mtp.0.ffn`` of the first one of
            further predictions.
        experts: how many each has.
        drop: whether one that is full leaves tokens out (``--moe-expert-capacity-factor``).
    """

    names: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()
    drop: bool = False

    @staticmethod
    def of(cfg: ModelConfig) -> ExpertLayers:
        """Those of the model that ``cfg`` describes."""
        layers, own = expert_layers(cfg), len(blocks_of(cfg))
        names = tuple(
            f"{index if index < own else f'mtp.{index - own}'}.{'mixer' if kind.is_mixer else 'ffn'}"
            for index, kind in layers
        )
        experts = tuple(kind.experts(cfg)[1] for _, kind in layers)
        return ExpertLayers(names, experts, cfg.moe_expert_capacity_factor is not None)
