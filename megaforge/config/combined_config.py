"""Flags of what is learnt beside rewards."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class CombinedLossConfig:
    """What :class:`megaforge.config.rl_config.ReinforcementConfig` has of texts beside episodes."""

    rl_ce_weight: float = flag(
        0.0, "weight of the cross-entropy of texts that are read beside what is played; 0: there are none", least=0
    )
    rl_ce_samples: int = flag(1, "with --rl-ce-weight: texts of --seq-length tokens beside each group", least=1)
    rl_ce_data: tuple[str, ...] = flag(
        (), "with --rl-ce-weight: what texts are of, as --data-path (default: windows of --data-path tasks://NAME)"
    )
