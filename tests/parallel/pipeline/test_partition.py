"""Balanced stages against every possible partition."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaforge.errors import UserError
from megaforge.parallel.pipeline.partition import partition_layers


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_balanced_partition_is_the_best_of_all(costs: list[int], num_stages: int) -> None:
    if num_stages > len(costs):
        with pytest.raises(UserError, match=f"at most {len(costs)} stages"):
            partition_layers(costs, num_stages)
        return
    stages = partition_layers(costs, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
    assert len(stages) == num_stages and all(stages)
    scores = []
    for cuts in combinations(range(1, len(costs)), num_stages - 1):
        bounds = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        scores.append((max(sums), sum(value**2 for value in sums)))
    found = [sum(costs[layer] for layer in stage) for stage in stages]
    assert (max(found), sum(value**2 for value in found)) == min(scores)


def test_head_and_embedding_weigh_in() -> None:
    assert partition_layers([0.1, *[1.0] * 8, 3.0], 4) == [range(3), range(3, 6), range(6, 9), range(9, 10)]


def test_fractional_costs_do_not_lose_the_best_partition() -> None:
    costs = [0.1] * 30
    assert {len(stage) for stage in partition_layers(costs, 10)} == {3}


def test_cuts_of_the_pattern_are_kept() -> None:
    assert partition_layers([1, 9, 1, 1], 2, cuts=[3]) == [range(3), range(3, 4)]


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [([1], "into 2 stages"), ([1, 1], "empty stage"), ([0, 2], "empty stage"), ([2, 4], "empty stage")],
)
def test_bad_cuts_are_refused(cuts: list[int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        partition_layers([1, 1, 1, 1], 3, cuts)
