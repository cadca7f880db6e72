"""Flags of the compliance report, and of what has to pass it."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag

LEVELS = ("basic", "standard", "enhanced")


@dataclass(frozen=True)
class ComplianceConfig:
    """What the report of a run is asked for."""

    enforce_compliance: bool = flag(
        False, "write --phase6-output only where the compliance report of the run passes; otherwise end with an error"
    )
    compliance_level: str = flag("enhanced", "level that the compliance report has to reach", choices=LEVELS)
    min_compliance_score: float = flag(0.95, "score that the compliance report has to reach", least=0, most=1)

    def validate(self) -> None:
        """Each flag has its own bounds."""
