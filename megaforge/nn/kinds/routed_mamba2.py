"""``O``: Routing Mamba."""

from __future__ import annotations

import dataclasses
from typing import Any

from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.nn.kinds.experts import KIND as EXPERTS
from megaforge.nn.kinds.mamba2 import Mamba2

# What shapes an FFN's experts alone.
_INNER = ("model.moe_ffn_hidden_size", "model.moe_shared_expert_intermediate_size")


class RoutedMamba2(Mamba2):
    """:class:`megaforge.nn.routed_mamba2.RoutedMamba2Mixer`."""

    title = "Routing Mamba layer"
    has_experts = True
    in_megatron = False
    settings = (
        *Mamba2.settings,
        *(setting for setting in EXPERTS.settings if setting not in _INNER),
        *("model.rom_num_experts", "model.rom_router_topk"),
    )

    def experts(self, cfg: ModelConfig) -> tuple[str, int]:
        if cfg.rom_num_experts is None:
            return "--num-experts", cfg.num_experts
        return "--rom-num-experts", cfg.rom_num_experts

    def expert_width(self, cfg: ModelConfig) -> tuple[str, int]:
        inner = cfg.mamba_heads * cfg.mamba_head_dim
        return f"the {inner} channels of Mamba-2's heads", inner

    def routing(self, cfg: ModelConfig) -> ModelConfig:
        """``cfg`` with the number and choice of this layer's experts in place of the FFNs'.

        Raises:
            UserError: no router chooses so.
        """
        topk = cfg.moe_router_topk if cfg.rom_router_topk is None else cfg.rom_router_topk
        own = dataclasses.replace(cfg, num_experts=self.experts(cfg)[1], moe_router_topk=topk)
        try:
            own.validate_experts()
        except UserError as error:
            raise UserError(
                f"Routing Mamba layers ({self.experts(cfg)[0]} {own.num_experts}, "
                f"{'--moe-router-topk' if cfg.rom_router_topk is None else '--rom-router-topk'} {topk}): {error}"
            ) from None
        return own

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        _ = self.routing(cfg)

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        """Its groups, as Mamba-2's; the width of experts is that of all heads, which then divides too."""
        return super().split_over_tp(config, world_size)

    def describe(self, cfg: ModelConfig) -> str:
        own = self.routing(cfg)
        return f"{super().describe(cfg)}, {own.num_experts} experts, {own.moe_router_topk} a token"

    def build(self, layer: Any) -> Any:
        from megaforge.nn.routed_mamba2 import RoutedMamba2Mixer

        return RoutedMamba2Mixer(dataclasses.replace(layer, cfg=self.routing(layer.cfg)))


KIND = RoutedMamba2()
