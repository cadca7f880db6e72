"""Qwen 2 and 2.5 (arXiv 2412.15115), Qwen 3 and its mixture of experts (arXiv 2505.09388), as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.attention import AttentionArchitecture
from megaforge.checkpoint.architectures.base import Given, Objection
from megaforge.checkpoint.architectures.mixtral import plain_routing
from megaforge.config.model_config import ModelConfig


class Qwen2(AttentionArchitecture):
    """Biases of queries, keys and values."""

    name, class_name, quantizable = "qwen2", "Qwen2ForCausalLM", True
    features: ClassVar[frozenset[str]] = frozenset({"add_qkv_bias"})
    defaults: ClassVar[Mapping[str, Any]] = {**AttentionArchitecture.defaults, "num_key_value_heads": 32}

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        found = super().objections(cfg)
        if type(self) is Qwen2 and cfg.num_attention_heads * cfg.head_dim != cfg.hidden_size:
            found.append(Objection("heads that are not as wide as the model", "no --kv-channels"))
        return found

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"use_sliding_window": False, "sliding_window": None}

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("use_sliding_window", (False,), "attention here sees all earlier tokens")
        return {"add_qkv_bias": True}


class Qwen3(Qwen2):
    """Norms of queries and keys, and no biases."""

    name, class_name = "qwen3", "Qwen3ForCausalLM"
    features: ClassVar[frozenset[str]] = frozenset({"qk_layernorm"})
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128}

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {**super().own_config(cfg), "attention_bias": False}

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("attention_bias", (False,), "biases of all four projections are not known with norms of heads")
        return super().own_model(given) | {"add_qkv_bias": False, "qk_layernorm": True}


class Qwen3MoE(Qwen3):
    """A mixture of experts in each block."""

    name, class_name, ffn, quantizable = "qwen3_moe", "Qwen3MoeForCausalLM", "E", False
    defaults: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in Qwen3.defaults.items() if name != "head_dim"},
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    in_layer: ClassVar[Mapping[str, str]] = {
        "router": "mlp.gate",
        "expert_gate": "mlp.experts.{e}.gate_proj",
        "expert_up": "mlp.experts.{e}.up_proj",
        "expert_down": "mlp.experts.{e}.down_proj",
    }

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        routing = [one for one in plain_routing(cfg) if one.has != "--moe-router-pre-softmax"]
        return super().objections(cfg) + routing

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            **super().own_config(cfg),
            "moe_intermediate_size": cfg.expert_ffn_size,
            "num_experts": cfg.num_experts,
            "num_experts_per_tok": cfg.moe_router_topk,
            "norm_topk_prob": not cfg.moe_router_pre_softmax,
            "router_aux_loss_coef": cfg.moe_aux_loss_coeff,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("decoder_sparse_step", (1,), "each layer here has experts")
        given.demand("mlp_only_layers", ([],), "each layer here has experts")
        experts = "num_experts" if given.get("num_local_experts") is None else "num_local_experts"  # of transformers 5
        return super().own_model(given) | {
            "ffn": "moe",
            "ffn_hidden_size": given.size("moe_intermediate_size"),
            "num_experts": given.size(experts),
            "moe_router_topk": given.size("num_experts_per_tok"),
            "moe_router_pre_softmax": not given.get("norm_topk_prob", False),
        }


QWEN2, QWEN3, QWEN3_MOE = Qwen2(), Qwen3(), Qwen3MoE()
