"""How many samples each optimizer step reads: one number, or a ramp that leads to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSchedule:
    """The size of the global batch that begins at any sample; which sample is the k-th never depends on it.

    Attributes:
        size: sequences of a global batch, where the ramp has ended.
        rampup: (start, increment, samples) of ``--rampup-batch-size``, with Megatron-LM's meaning: from ``start`` the
            size grows by ``increment`` each time an equal part of the first ``samples`` has been trained on. Empty: no
            ramp.
        before: samples of the run before sample 0, which ``--reset-data`` left behind; they are part of the ramp.
    """

    size: int
    rampup: tuple[int, ...] = ()
    before: int = 0

    @property
    def sizes(self) -> range:
        """All sizes, ascending."""
        start, increment = self.rampup[:2] or (self.size, 1)
        return range(start, self.size + 1, increment)

    def size_at(self, sample: int) -> int:
        """Sequences of the global batch that begins at ``sample``."""
        if not self.rampup:
            return self.size
        steps = len(self.sizes) - 1
        return self.sizes[min((sample + self.before) * steps // self.rampup[2], steps)]

    def stretches(self, sample: int) -> Iterator[tuple[int, int, int | None]]:
        """The batches from ``sample`` on, as stretches of one size: (first sample, size, how many), None: no end."""
        steps = len(self.sizes) - 1
        while (size := self.size_at(sample)) < self.size:
            grown = self.sizes.index(size) + 1
            left = -(-grown * self.rampup[2] // steps) - self.before - sample
            count = -(-left // size)
            yield sample, size, count
            sample += count * size
        yield sample, self.size, None

    def samples_after(self, steps: int, first: int = 0) -> int:
        """The sample behind ``steps`` global batches from ``first`` on: how many there were, from 0 on."""
        for start, size, count in self.stretches(first):
            if count is None or steps <= count:
                return start + steps * size
            steps -= count
        raise AssertionError("the last stretch has no end")

    def steps_until(self, samples: int, first: int = 0) -> int:
        """The fewest global batches from sample ``first`` on behind which ``samples`` have been read."""
        done = 0
        for start, size, count in self.stretches(first):
            needed = max(0, -(-(samples - start) // size))
            if count is None or needed <= count:
                return done + needed
            done += count
        raise AssertionError("the last stretch has no end")

    def __str__(self) -> str:
        return f"{self.sizes[0]} to {self.size}" if self.sizes[1:] else str(self.size)
