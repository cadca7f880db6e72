"""BitNet b1.58 2B4T (Ma et al., arXiv 2504.12285), as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.attention import AttentionArchitecture
from megaforge.checkpoint.architectures.base import Given, Objection
from megaforge.config.model_config import ModelConfig


class BitNet(AttentionArchitecture):
    """Norms in front of output and down projections, and no biases."""

    name, class_name, quantizable = "bitnet", "BitNetForCausalLM", True
    features: ClassVar[frozenset[str]] = frozenset({"sub_norm"})
    activations: ClassVar[Mapping[str, str]] = {"relu2": "gated_relu2", "silu": "swiglu"}
    defaults: ClassVar[Mapping[str, Any]] = {
        **AttentionArchitecture.defaults,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }

    def objections(self, cfg: ModelConfig) -> list[Objection]:
        found = super().objections(cfg)
        if cfg.num_attention_heads * cfg.head_dim != cfg.hidden_size:
            found.append(Objection("heads that are not as wide as the model, and sub-norms", "no --kv-channels"))
        return found

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": False, "mlp_bias": False}

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("attention_bias", (False,), "bitnet is known without biases")
        return {"sub_norm": True}


BITNET = BitNet()
