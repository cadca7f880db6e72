"""``*``: causal self-attention."""

from __future__ import annotations

from typing import Any

from megaforge.config.config import Config
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig


class Attention(LayerKind):
    """:class:`megaforge.nn.attention.SelfAttention`."""

    title = "attention layer"
    kernel = "attention"
    in_megatron = True
    settings = (
        *("model.kv_channels", "model.num_query_groups", "model.add_qkv_bias", "model.qk_layernorm"),
        "model.attention_dropout",
        *("model.rotary_base", "model.rotary_percent", "model.position_embedding_type", "optimizer.qk_clip"),
    )

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        model = config.model
        return [
            (f"--num-attention-heads {model.num_attention_heads}", model.num_attention_heads),
            (f"--num-query-groups {model.query_groups}", model.query_groups),
        ]

    def describe(self, cfg: ModelConfig) -> str:
        return f"positions {cfg.position_embedding_type}"

    def build(self, layer: Any) -> Any:
        from megaforge.nn.attention import SelfAttention

        return SelfAttention(layer)

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        """2 * s * heads * head size, for scores and weighted values over s/2 earlier tokens on average (document
        boundaries make it less)."""
        return 2.0 * sequence_length * cfg.num_attention_heads * cfg.head_dim


KIND = Attention()
