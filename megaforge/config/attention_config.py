"""Flags of attention layers, their positions included. They say what the model computes, so they are a part of its own
numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.config.quant_config import QuantConfig
from megaforge.errors import UserError
from megaforge.registry import POSITION_EMBEDDINGS


@dataclass(frozen=True)
class AttentionConfig(QuantConfig):
    """What :class:`megaforge.config.model_config.ModelConfig` has of attention."""

    hidden_size: int = flag(768, "width of the residual stream (d_model)", least=1, most=1 << 24)
    num_attention_heads: int = flag(12, "query heads of an attention block", least=1, most=1 << 20)
    num_query_groups: int | None = flag(
        None, "key/value heads (grouped-query attention); default: one a query head", least=1, most=1 << 20
    )
    kv_channels: int | None = flag(
        None, "channels of an attention head (default: hidden size / heads)", least=1, most=1 << 20
    )
    add_qkv_bias: bool = flag(False, "biases of queries, keys and values alone (Qwen 2.5)")
    qk_layernorm: bool = flag(
        False, "norm each head's queries and keys before they are rotated (Qwen 3), as --normalization says"
    )
    apply_wd_to_qk_layernorm: bool = flag(False, "decay the weights of --qk-layernorm, too")
    attention_dropout: float = flag(
        0.0, "share of attention's probabilities that is dropped in training, in steps of 1/65536", least=0, below=1
    )
    position_embedding_type: str = flag("rope", "positions of tokens", choices=POSITION_EMBEDDINGS)
    max_position_embeddings: int | None = flag(
        None, "longest sequence the model is meant for (default: --seq-length)", least=1
    )
    rotary_base: float = flag(10000.0, "base of the rotary frequencies", above=0)
    rotary_percent: float = flag(1.0, "share of each head's channels that rotates", above=0, most=1)
    rotary_interleaved: bool = flag(
        False, "rotate pairs of neighbouring channels (GPT-J), not the first half with the second"
    )
    rotary_seq_len_interpolation_factor: float | None = flag(
        None, "divide positions by this before they rotate (position interpolation)", above=0
    )
    use_rope_scaling: bool = flag(False, "slow down the low rotary frequencies by bands, as Llama 3.1 does")
    rope_scaling_factor: float = flag(8.0, "--use-rope-scaling: how much slower the lowest ones are", least=1)

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    def validate_attention(self) -> None:
        """
        Raises:
            UserError: naming the flag, its value and one that works.
        """
        POSITION_EMBEDDINGS.get(self.position_embedding_type).check(self)
        if self.num_attention_heads % self.query_groups:
            raise UserError(
                f"--num-query-groups {self.query_groups} does not divide "
                f"--num-attention-heads {self.num_attention_heads}"
            )
