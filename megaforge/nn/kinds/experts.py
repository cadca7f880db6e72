"""``E``: the mixture of experts."""

from __future__ import annotations

from typing import Any

from megaforge.config.config import Config
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig


class Experts(LayerKind):
    """:class:`megaforge.nn.moe.MoEFFN`."""

    title = "mixture of experts"
    asked_by = "--ffn moe, or "
    is_mixer = False
    has_experts = True
    recompute = "moe"
    in_megatron = True
    settings = tuple(
        f"model.{name}"
        for name in (
            *(
                "num_experts",
                "moe_ffn_hidden_size",
                "moe_router_topk",
                "moe_expert_capacity_factor",
                "moe_shared_expert_intermediate_size",
            ),
            *("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
            *("moe_router_num_groups", "moe_router_enable_expert_bias", "moe_router_load_balancing_type"),
            *("moe_aux_loss_coeff", "moe_z_loss_coeff"),
        )
    )

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        """The inner width where experts are laid out like dense layers, as no ``--etp`` says otherwise."""
        model, parallel, sizes = config.model, config.parallel, list[tuple[str, int]]()
        follows = parallel.expert_tensor_size(world_size) == parallel.tensor_model_parallel_size
        if follows and parallel.expert_tensor_parallel_size is None:
            sizes.append(self.expert_width(model))
        shared = model.moe_shared_expert_intermediate_size
        if shared is not None:
            sizes.append((f"--moe-shared-expert-intermediate-size {shared}", shared))
        return sizes

    def expert_width(self, cfg: ModelConfig) -> tuple[str, int]:
        flag = "--ffn-hidden-size" if cfg.moe_ffn_hidden_size is None else "--moe-ffn-hidden-size"
        return f"{flag} {cfg.expert_ffn_size}", cfg.expert_ffn_size

    def describe(self, cfg: ModelConfig) -> str:
        return f"{cfg.num_experts} experts, {cfg.moe_router_topk} a token"

    def build(self, layer: Any) -> Any:
        from megaforge.nn.moe import MoEFFN

        return MoEFFN(layer)


KIND = Experts()
