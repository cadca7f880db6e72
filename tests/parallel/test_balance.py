"""Sharing out work: the costliest first, always to who has least."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megaforge.parallel.balance import balanced

PIECES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=30)


@given(PIECES, st.integers(1, 5), st.booleans())
def test_each_piece_goes_to_who_has_least(pieces: list[tuple[int, int]], ranks: int, by_size: bool) -> None:
    costs, sizes = [float(cost) for cost, _ in pieces], [size for _, size in pieces]
    load, size, expected = [0.0] * ranks, [0] * ranks, [0] * len(pieces)
    for piece in sorted(range(len(pieces)), key=lambda piece: (-costs[piece], piece)):
        rank = min(range(ranks), key=lambda rank: (load[rank], size[rank], rank))
        expected[piece] = rank
        load[rank] += costs[piece]
        size[rank] += sizes[piece] * by_size
    assert balanced(costs, ranks, sizes if by_size else None) == expected
