"""How many samples each optimizer step reads: one number, a ramp that leads to it, or steps at given samples."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megaforge.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)([KMBT]?)"


@dataclass(frozen=True)
class BatchSchedule:
    """The size of the global batch that begins at any sample; which sample is the k-th never depends on it.

    Attributes:
        size: sequences of a global batch, where it changes no more.
        rampup: (start, increment, samples) of ``--rampup-batch-size``, with Megatron-LM's meaning: from ``start`` the
            size grows by ``increment`` each time an equal part of the first ``samples`` has been trained on. Empty: no
            ramp.
        before: samples of the run before sample 0, which ``--reset-data`` left behind; they count for changes.
        steps: (samples, size) of ``--step-batch-size-schedule``, ascending, the first from 0; empty: none.
    """

    size: int
    rampup: tuple[int, ...] = ()
    before: int = 0
    steps: tuple[tuple[int, int], ...] = ()

    @cached_property
    def _changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(samples of the run, sizes from there on), ascending samples."""
        if self.steps:
            firsts, sizes = zip(*self.steps, strict=True)
            return firsts, sizes
        if not self.rampup:
            return (0,), (self.size,)
        start, increment, samples = self.rampup
        ramp = range(start, self.size + 1, increment)
        return tuple(-(-grown * samples // (len(ramp) - 1)) for grown in range(len(ramp))), tuple(ramp)

    @property
    def sizes(self) -> list[int]:
        """All sizes, ascending."""
        return sorted(set(self._changes[1]))

    @property
    def changes(self) -> bool:
        """Whether there is more than one size."""
        return len(self.sizes) > 1

    @property
    def flag(self) -> str:
        """How other sizes than the last were asked for."""
        return "--step-batch-size-schedule" if self.steps else "--rampup-batch-size"

    def size_at(self, sample: int) -> int:
        """Sequences of the global batch that begins at ``sample``."""
        firsts, sizes = self._changes
        return sizes[bisect_right(firsts, sample + self.before) - 1]

    def stretches(self, sample: int) -> Iterator[tuple[int, int, int | None]]:
        """The batches from ``sample`` on, as stretches of one size: (first sample, size, how many), None: no end."""
        firsts, sizes = self._changes
        while (after := bisect_right(firsts, sample + self.before)) < len(firsts):
            size = sizes[after - 1]
            count = -(-(firsts[after] - self.before - sample) // size)
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
        return f"{self._changes[1][0]} to {self.size}" if self.changes else str(self.size)


def parse_steps(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(tokens, size) of each TOKENS:SIZE in ``texts``, of which one may hold several: as Megatron-LM reads
    ``--step-batch-size-schedule``.

    Raises:
        UserError: one is not of this form, the first is not from 0 on, or they do not ascend.
    """
    given, found = f"--step-batch-size-schedule {' '.join(texts)}", list[tuple[int, int]]()
    for entry in " ".join(texts).replace(",", " ").strip("'\"").split():
        match = re.fullmatch(f"{_NUMBER}:{_NUMBER}", entry.upper())
        if match is None:
            raise UserError(f"{given}: {entry} is not TOKENS:SIZE, such as 2.4B:320")
        tokens, unit, size, thousands = match.groups()
        found.append((int(float(tokens) * _UNITS[unit]), int(float(size) * _UNITS[thousands])))
    if texts and (not found or found[0][0]):
        raise UserError(f"{given}: it does not say the first size; begin with 0:SIZE")
    for (one, _), (other, size) in zip(found, found[1:], strict=False):
        if other <= one:
            raise UserError(f"{given}: {other}:{size} does not come behind {one} tokens; let them ascend")
    if any(size < 1 for _, size in found):
        raise UserError(f"{given}: a size must be at least 1")
    return tuple(found)


def in_samples(steps: Sequence[tuple[int, int]], seq_length: int) -> tuple[tuple[int, int], ...]:
    """The steps of :func:`parse_steps` as :class:`BatchSchedule` counts: those that begin in one sample are one."""
    return tuple({tokens // seq_length: size for tokens, size in steps}.items())
