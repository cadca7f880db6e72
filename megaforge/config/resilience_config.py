"""Flags of what a run survives, and of how it tells what went wrong."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run survives, and how it tells what went wrong."""

    # Ranks that hang or are slow

    # Snapshots in memory

    # Steps that are skipped or made again
    skip_nonfinite_steps: int = flag(
        0,
        "steps in a row that may be left out because their gradient is not finite, before the run ends (those that a "
        "lower loss scale answers are not counted)",
        least=0,
    )

    # Ranks that come and go

    def validate(self) -> None:
        """The fields' bounds are all there is to check."""
