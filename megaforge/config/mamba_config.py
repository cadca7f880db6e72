"""Flags of Mamba-2 layers, with Megatron-LM's names and values. They say what the model computes, so they are a part of
its own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.attention_config import AttentionConfig
from megaforge.config.fields import flag


@dataclass(frozen=True)
class MambaConfig(AttentionConfig):
    """What :class:`megaforge.config.model_config.ModelConfig` has of Mamba-2."""

    mamba_state_dim: int = flag(128, "state channels of a Mamba-2 layer", least=1, most=1 << 16)
    mamba_head_dim: int = flag(64, "channels of a Mamba-2 head", least=1, most=1 << 16)
    mamba_num_groups: int = flag(
        8, "groups of Mamba-2 heads: each has one B, one C and one norm of its output", least=1, most=1 << 20
    )
    mamba_num_heads: int | None = flag(
        None, "heads of a Mamba-2 layer (default: 2 x hidden size / --mamba-head-dim)", least=1, most=1 << 20
    )

    @property
    def mamba_heads(self) -> int:
        return self.mamba_num_heads or 2 * self.hidden_size // self.mamba_head_dim
