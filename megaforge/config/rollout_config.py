"""Flags of answers that a model writes to learn from: ``--objective rlvr``."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class RolloutConfig:
    """Answers that a model writes, to be rewarded for (--objective rlvr)."""

    rl_max_new_tokens: int = flag(
        64, "--objective rlvr: tokens of an answer, at most, its end included", least=1, most=1 << 24
    )
    rl_temperature: float = flag(1.0, "--objective rlvr: of the draws, and of the policy that is trained", above=0)
    rl_rollout_batch_size: int = flag(
        64, "--objective rlvr: answers that a rank writes side by side", least=1, most=1 << 20
    )
    rl_task_chunks: int = flag(
        3, "--objective rlvr with tasks://: chunks of a text, --task-chunk-tokens words each", least=1, most=1 << 24
    )

    def validate(self) -> None:
        """Nothing depends on anything else here."""
