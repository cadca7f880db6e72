"""Flags of what is read when, and from where it comes."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.augmentation_config import AugmentationConfig
from megaforge.config.fields import flag


@dataclass(frozen=True)
class ReadingConfig(AugmentationConfig):
    """What :class:`megaforge.config.run_config.DataConfig` has of schedules and streams."""

    data_schedule: str | None = flag(
        None,
        "what is read when, by domain, length, quality and age of the datasets: a file ending in .yaml, or "
        "corpus/standard or corpus/extended, with +reason behind it or without",
        metavar="FILE|NAME",
    )
