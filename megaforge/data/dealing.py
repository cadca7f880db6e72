"""How many micro-batches of a global batch each data-parallel rank takes, by how fast it is."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class Dealing:
    """Deals micro-batches out so that the slowest is through as early as can be. The same on every rank.

    Args:
        ranks: dp ranks.
        span: neighbouring dp ranks that must take as many as each other, as they share experts; divides ``ranks``.
        unit: what a rank's number must be a multiple of, for its pipeline schedule.

    Attributes:
        speeds: of each span of ranks, in any unit; all alike at first.
    """

    def __init__(self, ranks: int, span: int = 1, unit: int = 1) -> None:
        if ranks % span:
            raise ValueError(f"{ranks} ranks are not whole spans of {span}")
        self.ranks, self.span, self.unit = ranks, span, unit
        self.speeds: tuple[float, ...] = (1.0,) * (ranks // span)

    def counts(self, micro_batches: int, speeds: Sequence[float] | None = None) -> list[int]:
        """Of each dp rank, by :attr:`speeds` or others; at least one unit for everyone.

        Raises:
            ValueError: ``micro_batches`` cannot be dealt out in units, or a speed is not positive.
        """
        speeds = self.speeds if speeds is None else speeds
        if not all(speed > 0 for speed in speeds):
            raise ValueError(f"micro-batches for ranks of the speeds {list(speeds)}: each has to be positive")
        units, rest = divmod(micro_batches, self.span * self.unit)
        if rest or units < len(speeds):
            raise ValueError(f"{micro_batches} micro-batches for {self.ranks} ranks, {self.span} x {self.unit} at once")
        dealt = [1] * len(speeds)
        through = [(2 / speed, place) for place, speed in enumerate(speeds)]  # when, with one unit more
        heapq.heapify(through)
        for _ in range(units - len(speeds)):
            _, place = through[0]
            dealt[place] += 1
            heapq.heapreplace(through, ((dealt[place] + 1) / speeds[place], place))
        return [count * self.unit for count in dealt for _ in range(self.span)]


def dealt(counts: Sequence[int], rank: int) -> list[int]:
    """The numbers of the micro-batches that ``rank`` takes: they are dealt out in rounds, in which each rank takes one
    until it has ``counts`` of them. With equal counts rank r takes r, r + ranks, r + 2 ranks, ..."""
    own, number = [], 0
    for turn in range(counts[rank]):
        own.append(number + sum(count > turn for count in counts[:rank]))
        number += sum(count > turn for count in counts)
    return own
