"""Flags of what a run records of its layers with experts."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class ExpertLoggingConfig:
    """What :class:`megaforge.config.run_config.LoggingConfig` has of layers with experts."""

    moe_per_layer_logging: bool = flag(
        False, "record balance and losses of each layer with experts, besides the numbers of all of them"
    )
