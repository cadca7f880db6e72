"""Flags of ``--peft prefix`` and ``--peft p_tuning_v2``: trained keys and values in front of each document."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class PrefixConfig:
    """What :class:`megaforge.config.model_config.ModelConfig` has of prefixes."""

    prefix_length: int = flag(
        20, "--peft prefix, p_tuning_v2: keys and values in front of each document", least=1, most=1 << 20
    )
    prefix_hidden_size: int = flag(
        512, "--peft prefix: inner width of what makes the keys and values of a layer", least=1, most=1 << 20
    )
