"""Llama (Touvron et al., arXiv 2302.13971), as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megaforge.checkpoint.architectures.attention import AttentionArchitecture
from megaforge.checkpoint.architectures.base import Given
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError


class Llama(AttentionArchitecture):
    """Gated SiLU, biases in all projections or in none."""

    name, class_name, quantizable, biases = "llama", "LlamaForCausalLM", True, True

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": cfg.add_bias_linear, "mlp_bias": cfg.add_bias_linear}

    def own_model(self, given: Given) -> dict[str, Any]:
        if given.get("attention_bias", False) != given.get("mlp_bias", False):
            raise UserError(
                f"{given.path}: attention_bias and mlp_bias differ; here both kinds of layers have biases or none"
            )
        return {"add_bias_linear": bool(given.get("attention_bias", False))}


class Arcee(Llama):
    """Arcee's AFM: Llama with a squared ReLU without a gate."""

    name, class_name = "arcee", "ArceeForCausalLM"
    activations: ClassVar[Mapping[str, str]] = {"relu2": "relu2"}
    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, "hidden_act": "relu2", "rms_norm_eps": 1e-5}


class Mistral(Llama):
    """Mistral, where attention sees all earlier tokens: a Llama, which it is written as."""

    name, class_name, biases = "mistral", "MistralForCausalLM", False
    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, "num_key_value_heads": 8, "sliding_window": 4096}

    def own_config(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": None}

    def own_model(self, given: Given) -> dict[str, Any]:
        given.demand("sliding_window", (None,), "attention here sees all earlier tokens")
        return {}


LLAMA, ARCEE, MISTRAL = Llama(), Arcee(), Mistral()
