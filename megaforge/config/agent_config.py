"""Flags of what a memory agent adds to a model. They say what the model computes, so they are a part of its own
numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class AgentConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of the agent's heads."""

    agent_heads: bool = flag(
        False,
        "put an agent's heads on the model: a policy over actions, a value, and the summariser of its memory; all else "
        "is frozen, but for what --peft trains",
    )
    memory_dim: int = flag(
        512, "with --agent-heads: size of summaries, and of keys of the index", least=1, most=1 << 16
    )
    memory_stride: int = flag(8, "with --agent-heads: tokens that one summary stands for", least=1, most=1 << 20)

    @property
    def head_converters(self) -> tuple[str, ...]:
        """Names in :data:`megaforge.registry.CONVERTERS` of what puts heads beside the output head."""
        return ("agent_heads",) if self.agent_heads else ()
