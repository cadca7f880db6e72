"""Documents that are too short or too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.errors import UserError


@dataclass(frozen=True)
class LengthSettings(StageSettings):
    """``length``: characters of a document."""

    minimum: int = flag(50, "characters of the shortest document that is kept", least=0)
    maximum: int = flag(1_000_000, "characters of the longest document that is kept", least=1)

    def validate(self) -> None:
        """
        Raises:
            UserError: no length is between the two.
        """
        if self.minimum > self.maximum:
            raise UserError(f"minimum {self.minimum}: must be at most maximum, {self.maximum}")

    def open(self, scope: Scope) -> Length:
        """See :class:`StageSettings`."""
        return Length(self)


class Length(RowStage):
    """Drops documents of fewer characters than ``minimum`` or more than ``maximum``."""

    def __init__(self, settings: LengthSettings) -> None:
        self._settings = settings

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        return Outcome(records, [self._reason(length) for length in pc.utf8_length(records["text"]).to_pylist()])

    def _reason(self, length: int) -> str | None:
        if length < self._settings.minimum:
            return f"too short ({length:,} characters)"
        if length > self._settings.maximum:
            return f"too long ({length:,} characters)"
        return None
