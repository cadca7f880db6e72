"""Flags of the two stages of a reasoning model."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class StageConfig:
    """Stage A and stage B, where --config has a section stage_b."""

    stage: str | None = flag(
        None, "train this stage alone (default: a, then b where --config has a section stage_b)", choices=("a", "b")
    )
    stage_b_flags: str | None = flag(
        None, "flags of stage B, in quotes, against its section stage_b; others of the line hold where that is silent"
    )

    @property
    def callbacks(self) -> tuple[str, ...]:
        """Names in :data:`megaforge.registry.CALLBACKS` of those that a stage comes with."""
        return ("core_text",) if self.stage == "b" else ()

    def validate(self) -> None:
        """Flags of stage B are looked at as those of a line."""
