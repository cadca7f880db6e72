"""A data source around another: whatever it does not change is the other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.data.data_source import DataSource, SampleView


class WrappedSource(DataSource):
    """``source`` as it is; what derives from this changes some of it.

    Attributes:
        source: what is wrapped; what :class:`megaforge.data.data_source.DataSource` does not know is asked of it.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.eod_mask_loss, self.notices = source.eod_mask_loss, source.notices

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    @property
    def stage_starts(self) -> Sequence[int]:
        return self.source.stage_starts

    def sequence_length(self, k: int) -> int:
        return self.source.sequence_length(k)

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        return self.source.fill(k, tokens, marks)

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.source.shown(k, inputs)

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        self.source.weigh(k, counts)

    def domain(self, k: int) -> str | None:
        return self.source.domain(k)

    @property
    def end(self) -> int | None:
        return self.source.end

    @property
    def epoch_tokens(self) -> Sequence[int]:
        return self.source.epoch_tokens

    def passes(self, samples: int) -> Sequence[float]:
        return self.source.passes(samples)

    def tokens_before(self, samples: int) -> int:
        return self.source.tokens_before(samples)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return self.source.state(consumed_samples)

    def check_state(self, saved: dict[str, Any]) -> None:
        self.source.check_state(saved)

    def bytes_per_token(self, split: str = "valid") -> float | None:
        return self.source.bytes_per_token(split)

    def validation(self, split: str = "valid") -> SampleView:
        return self.source.validation(split)
