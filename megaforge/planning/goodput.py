"""What failures cost a long run, and how often to save against them.

A run keeps its state in tiers: durable checkpoints, which survive everything, and snapshots in memory, which survive a
process, and where a peer holds a copy a node. A save stops training for a while, and a failure throws away what was
done since the newest state that survives it, half an interval on average. To first order in the interval over the mean
time between failures M (Young, "A first order approximation to the optimum checkpoint interval", CACM 1974; for several
tiers Di et al., "Optimization of multi-level checkpoint model", IPDPS 2014) the share of time lost is

    sum over tiers of  stall / T + share (T / 2 + restart) / M,

least at ``T = sqrt(2 stall M / share)``. Failures of single devices are independent, so M falls as 1 / devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

HOLDS = 0.1  # lost share up to which terms of second order are small (the formula is then within a tenth of itself)


@dataclass(frozen=True)
class Tier:
    """One kind of saved state.

    Attributes:
        stall: seconds that training stands still for a save.
        restart: seconds from a failure to the first new step, without the steps that are done again.
        share: of all failures, those that this tier is gone back to for.
        writing: seconds until one is written while training goes on: none begins before.
    """

    stall: float
    restart: float
    share: float = 1.0
    writing: float = 0.0

    def interval(self, mtbf: float) -> float:
        """Seconds between saves that lose least, with ``mtbf`` seconds between failures on average."""
        return max(math.sqrt(2 * self.stall * mtbf / self.share), self.writing) if self.share else math.inf

    def lost(self, mtbf: float, interval: float | None = None) -> float:
        """Share of time that saves every ``interval`` seconds and failures cost; without one, at the best."""
        chosen = self.interval(mtbf) if interval is None else interval
        back = self.share * (chosen / 2 + self.restart) / mtbf if self.share else 0.0
        return (self.stall / chosen if chosen else 0.0) + back


def two_tiers(durable: Tier, snapshot: Tier) -> tuple[Tier, Tier]:
    """Both, where failures that no snapshot survives are left to the durable tier."""
    return replace(durable, share=1 - snapshot.share), snapshot


def lost(tiers: Sequence[Tier], mtbf: float) -> float:
    """Share of time lost at the best intervals."""
    return sum(tier.lost(mtbf) for tier in tiers)


def least_mtbf(tiers: Sequence[Tier], goal: float) -> float:
    """Mean seconds between failures at which just ``goal`` of the time is lost: with fewer, more is. 0: never."""
    low, high = 1e-3, 1e15
    if lost(tiers, low) <= goal:
        return 0.0
    for _ in range(120):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if lost(tiers, middle) <= goal else (middle, high)
    return high
