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
    data_order: str = flag(
        "shuffled",
        "the documents of an epoch: shuffled all together, or as --data-path stream:... reads text: in file order, "
        "shuffled within rounds",
        choices=("shuffled", "streamed"),
    )
    stream_round: int = flag(
        1024, "with stream:... or --data-order streamed: documents of a round", least=1, most=1 << 24
    )
    json_key: str = flag("text", "with stream:...: where JSON and tables have their text")
    stream_on_error: str = flag(
        "fail",
        "with stream:...: what a record without a text does: end the run, or be left out",
        choices=("fail", "skip"),
    )
    data_cache_dir: str | None = flag(
        None,
        "a directory on a fast disk: datasets are copied there once a machine and read there, and remote files of "
        "stream:... as they are needed",
        metavar="DIR",
    )
    data_cache_size: float = flag(100.0, "with --data-cache-dir: GB that it may hold", above=0)

    @property
    def data_cache_bytes(self) -> int:
        """``--data-cache-size`` in bytes."""
        return int(self.data_cache_size * 1e9)

    @property
    def streams(self) -> bool:
        """Whether the words of ``--data-path`` name text that is tokenised as it is read."""
        return any(word.startswith("stream:") for word in getattr(self, "data_path", ()))
