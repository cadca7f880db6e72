"""Box arithmetic against counting elements one by one in a small grid."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megaforge.checkpoint.boxes import box_of, coverage_error, find_overlap, intersect, volume

SIZE = 5


@st.composite
def boxes(draw, dims: int):
    return tuple(tuple(sorted((draw(st.integers(0, SIZE)), draw(st.integers(0, SIZE))))) for _ in range(dims))


@st.composite
def box_lists(draw):
    dims = draw(st.integers(0, 3))
    return dims, draw(st.lists(boxes(dims), max_size=6))


def count(dims, some):
    """How often each element of the grid lies in a box."""
    grid = np.zeros((SIZE,) * dims, dtype=int)
    for box in some:
        grid[tuple(slice(*interval) for interval in box)] += 1
    return grid


@given(box_lists())
def test_overlap_is_what_counting_says(case):
    dims, some = case
    found = find_overlap(some)
    assert (found is not None) == bool((count(dims, some) > 1).any())
    if found is not None:
        assert (count(dims, [some[index] for index in found]) > 1).any()
        assert found[0] != found[1]


@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(st.just(dims), boxes(dims), boxes(dims))))
def test_intersection_is_what_counting_says(case):
    dims, one, other = case
    common = count(dims, [one]) * count(dims, [other])
    shared = intersect(one, other)
    assert (0 if shared is None else volume(shared)) == common.sum()
    if shared is not None:
        assert (count(dims, [shared]) == common).all()


@given(box_lists())
def test_coverage_is_what_counting_says(case):
    dims, some = case
    target = box_of((0,) * dims, (SIZE,) * dims)
    assert (coverage_error(target, some) is None) == bool((count(dims, some) == 1).all())


@st.composite
def cuttings(draw):
    """A grid cut into boxes by repeated halving at random places, shuffled."""
    dims = draw(st.integers(1, 3))
    pieces = [box_of((0,) * dims, (SIZE,) * dims)]
    for _ in range(draw(st.integers(0, 6))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        dim = draw(st.integers(0, dims - 1))
        start, stop = piece[dim]
        middle = draw(st.integers(start, stop))
        pieces += [(*piece[:dim], half, *piece[dim + 1 :]) for half in ((start, middle), (middle, stop))]
    return dims, draw(st.permutations(pieces))


@given(cuttings(), st.data())
def test_any_cutting_covers_and_stops_covering_without_a_piece(case, data):
    dims, pieces = case
    target = box_of((0,) * dims, (SIZE,) * dims)
    assert coverage_error(target, pieces) is None
    filled = [index for index, piece in enumerate(pieces) if volume(piece)]
    index = data.draw(st.sampled_from(filled))
    assert "in no piece" in coverage_error(target, pieces[:index] + pieces[index + 1 :])
    assert "overlap" in coverage_error(target, [*pieces, pieces[index]])


def test_a_piece_outside_the_target_is_named():
    assert "leaves" in coverage_error(((0, 4),), [((0, 5),)])
    assert "dimensions" in coverage_error(((0, 4),), [((0, 4), (0, 1))])
