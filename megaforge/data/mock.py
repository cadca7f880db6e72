"""``--mock-data``: samples of random tokens without any file, to measure speed and to try a configuration out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.sample_order import key_of, splitmix64
from megaforge.data.sample_schedule import Plan, SampleSchedule, ScheduledSource, make_state
from megaforge.data.sidecar import digest_of

MEAN_DOCUMENT = 512  # tokens of a document on average, as far as samples have room
_VERSION = 1


class MockData(ScheduledSource):
    """Endless samples of uniformly random ids; sample k is a pure function of (seed, k), whatever the layout.

    Each sample begins with a document, and a new one begins at any later token with probability 1 / 512. There is
    nothing to learn in them but that every id is as likely as any other.

    Args:
        schedule: seed, sequence length and later changes.
        vocab_size: ids drawn are below it.
        part: train or valid, which differ in all samples.
    """

    def __init__(
        self, schedule: SampleSchedule, vocab_size: int, *, eod_mask_loss: bool = False, part: str = "train"
    ) -> None:
        self.eod_mask_loss = eod_mask_loss
        self.notices = [f"--mock-data: samples of random ids below {vocab_size:,}; nothing can be learned from them"]
        self.plan = Plan(schedule, [1.0])
        self.digest = digest_of(["mock", _VERSION, vocab_size])
        self._schedule, self._vocab_size = schedule, np.uint64(vocab_size)
        self._key = ["mock", _VERSION, part, schedule.seed]

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes sample ``k`` and its document starts, [S + n] each; all labels count."""
        drawn = splitmix64(key_of(*self._key, k), np.arange(len(tokens), dtype=np.uint64))
        # The high half chooses the token and the low one where documents begin.
        tokens[:] = ((drawn >> np.uint64(32)) * self._vocab_size) >> np.uint64(32)
        marks[:] = drawn % np.uint64(MEAN_DOCUMENT) == 0
        marks[0] = True
        return len(tokens) - 1

    def state(self, consumed_samples: int) -> dict[str, Any]:
        """As :meth:`megaforge.data.samples.TrainingData.state`."""
        state = make_state(self.plan, self.digest, ((1.0, 0.0, 0.0), "sequential"), consumed_samples)
        return state | {"sources": [{"digest": self.digest, "choices": None}]}

    def validation(self, split: str = "valid") -> MockData:
        """Other samples of the same kind, as endless as these."""
        return MockData(self._schedule, int(self._vocab_size), eod_mask_loss=self.eod_mask_loss, part=split)


def open_mock(config: Config) -> MockData:
    """The random samples that the flags ask for."""
    vocab_size = config.model.vocab_size or config.model.padded_vocab_size()
    return MockData(SampleSchedule.of(config), vocab_size, eod_mask_loss=config.data.eod_mask_loss)
