"""Flags of Routing Mamba layers, which Mamba-2's and those of experts shape besides. They say what the model computes,
so they are a part of its own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class RomConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of Routing Mamba."""

    rom_num_experts: int | None = flag(
        None, "experts of a Routing Mamba layer (default: --num-experts)", least=1, most=1_000_000
    )
    rom_router_topk: int | None = flag(
        None, "experts a token goes to in a Routing Mamba layer (default: --moe-router-topk)", least=1, most=1_000_000
    )
