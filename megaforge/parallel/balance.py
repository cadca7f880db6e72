"""Who of several ranks does what, so that all have about the same to do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced(costs: Sequence[float], ranks: int, sizes: Sequence[int] | None = None) -> list[int]:
    """The rank of each piece of work: the costliest first, always to the rank that has least so far ("longest
    processing time", Graham 1969).

    Args:
        costs: of each piece; of equal ones the first comes first.
        sizes: of each piece: of ranks that have equally much to do, the next gets what has the smallest sum of these,
            then the first.
    """
    ready = [(0.0, 0, rank) for rank in range(ranks)]
    found = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        load, size, rank = ready[0]
        found[piece] = rank
        heapq.heapreplace(ready, (load + costs[piece], size + (0 if sizes is None else sizes[piece]), rank))
    return found
