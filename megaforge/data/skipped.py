"""A run's samples without those that it leaves out after a spike: the others move up, and keep their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.data.data_source import DataSource
from megaforge.data.wrapped import WrappedSource

Stretch = tuple[int, int]  # first sample and the one behind the last, by the numbers of the source


class SkippedSamples(WrappedSource):
    """``source`` without :attr:`stretches`; the same samples as long as there are none.

    Sample k of the run is the k-th of those that are left, so that batches, schedules and counts of what was trained on
    need not know.

    Attributes:
        stretches: what is left out, ascending; by the numbers of ``source``.
    """

    def __init__(self, source: DataSource) -> None:
        super().__init__(source)
        self.stretches: tuple[Stretch, ...] = ()

    def leave_out(self, stretches: Iterable[Sequence[int]]) -> None:
        """Leaves out these ``(first, stop)`` too."""
        joined: list[Stretch] = []
        for first, stop in sorted((*self.stretches, *((int(a), int(b)) for a, b in stretches))):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(joined[-1][1], stop)
            elif first < stop:
                joined.append((first, stop))
        self.stretches = tuple(joined)

    def take_back(self) -> None:
        """Leaves nothing out."""
        self.stretches = ()

    def number(self, k: int) -> int:
        """What the source calls sample ``k`` of the run."""
        for first, stop in self.stretches:
            k += stop - first if k >= first else 0
        return k

    def read_before(self, samples: int) -> int:
        """How many samples of the source lie before the end of the run's first ``samples``, those left out included."""
        for first, stop in self.stretches:
            samples += stop - first if samples > first else 0
        return samples

    def left_before(self, number: int) -> int:
        """How many of the source's first ``number`` samples are left."""
        return number - sum(max(0, min(stop, number) - first) for first, stop in self.stretches)

    @property
    def stage_starts(self) -> Sequence[int]:
        return [self.left_before(start) for start in self.source.stage_starts]

    @property
    def end(self) -> int | None:
        return None if self.source.end is None else self.left_before(self.source.end)

    def sequence_length(self, k: int) -> int:
        return self.source.sequence_length(self.number(k))

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        return self.source.fill(self.number(k), tokens, marks)

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.source.shown(self.number(k), inputs)

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        self.source.weigh(self.number(k), counts)

    def domain(self, k: int) -> str | None:
        return self.source.domain(self.number(k))

    def passes(self, samples: int) -> Sequence[float]:
        return self.source.passes(self.read_before(samples))

    def tokens_before(self, samples: int) -> int:
        read = self.read_before(samples)
        before = self.source.tokens_before
        return before(read) - sum(before(stop) - before(first) for first, stop in self.stretches if first < read)

    def state(self, consumed_samples: int) -> dict[str, Any]:
        left_out = {"skipped": [list(stretch) for stretch in self.stretches]} if self.stretches else {}
        return self.source.state(self.read_before(consumed_samples)) | left_out

    def check_state(self, saved: dict[str, Any]) -> None:
        """As the source does; what a checkpoint leaves out is left out from here on."""
        self.take_back()
        self.leave_out(saved.get("skipped", ()))
        consumed = saved["consumed_samples"]
        read = {"consumed_samples": self.read_before(consumed)}
        if self.stretches and "consumed_tokens" in saved:
            left_out = self.source.tokens_before(read["consumed_samples"]) - self.tokens_before(consumed)
            read["consumed_tokens"] = saved["consumed_tokens"] + left_out
        self.source.check_state(saved | read)
