"""Mixtral (Jiang et al., arXiv 2401.04088), as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.attention import AttentionArchitecture
from megaforge.checkpoint.architectures.base import Given, Objection
from megaforge.config.model_config import ModelConfig


class Mixtral(AttentionArchitecture):
    """A mixture of experts with gated SiLU in each block: the softmax of the chosen experts' logits."""

    name, class_name, ffn = "mixtral", "MixtralForCausalLM", "E"
    defaults: ClassVar[Mapping[str, Any]] = {
        **AttentionArchitecture.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    in_layer: ClassVar[Mapping[str, str]] = {
        "router": "block_sparse_moe.gate",
        "expert_gate": "block_sparse_moe.experts.{e}.w1",
        "expert_up": "block_sparse_moe.experts.{e}.w3",
        "expert_down": "block_sparse_moe.experts.{e}.w2",
    }

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        return super().objections(cfg) + plain_routing(cfg)

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": cfg.expert_ffn_size,
            "num_local_experts": cfg.num_experts,
            "num_experts_per_tok": cfg.moe_router_topk,
            "router_aux_loss_coef": cfg.moe_aux_loss_coeff,
            "sliding_window": None,
        }

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("sliding_window", (None,), "attention here sees all earlier tokens")
        return {
            "ffn": "moe",
            "num_experts": given.size("num_local_experts"),
            "moe_router_topk": given.size("num_experts_per_tok"),
        }


def plain_routing(cfg: ModelConfig) -> list[Objection]:
    """What keeps a router from being the softmax of the chosen experts' logits."""
    found = []
    if cfg.moe_router_score_function != "softmax":
        found.append(Objection(f"{cfg.moe_router_score_function} scores", "--moe-router-score-function softmax"))
    if cfg.moe_router_pre_softmax:
        found.append(Objection("--moe-router-pre-softmax", "weights that add up to 1 (--no-moe-router-pre-softmax)"))
    if cfg.moe_router_topk_scaling_factor not in (None, 1):
        found.append(Objection("scaled routing weights", "no --moe-router-topk-scaling-factor"))
    if cfg.moe_router_num_groups not in (None, 1):
        found.append(Objection("groups of experts", "no --moe-router-num-groups"))
    if cfg.moe_shared_expert_intermediate_size is not None:
        found.append(Objection("a shared expert", "no --moe-shared-expert-intermediate-size"))
    return found


MIXTRAL = Mixtral()
