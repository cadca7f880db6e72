"""Rates between ranks, within a host and between hosts."""

from __future__ import annotations

from megaforge.parallel.context import ParallelContext
from megaforge.planning.links import Link, groups_between, groups_within, measure_link
from tests.parallel.pool import RankPool


def test_groups_of_ranks_by_host() -> None:
    hosts = ["a", "a", "b", "b", "b", "c"]
    assert groups_within(hosts) == [[0, 1], [2, 3, 4]]
    assert groups_between(hosts) == [[0, 2, 5]], "as far as every host has one"
    assert groups_between(["a", "b", "a", "b"]) == [[0, 1], [2, 3]]
    assert groups_within(["a", "b"]) == [] == groups_between(["a", "a"])


def _links() -> list[Link | None]:
    ctx = ParallelContext.create()
    hosts = ["a", "a", "b"]
    return [measure_link(ctx, groups, 4096) for groups in (groups_within(hosts), groups_between(hosts), [])]


def test_all_ranks_learn_what_the_slowest_group_reaches(ranks: RankPool) -> None:
    """Rank 2 is alone on its host, and rank 1 has no partner on the other."""
    first, *others = ranks.run(3, _links)
    assert others == [first, first]
    within, between, nothing = first
    assert within is not None and between is not None and nothing is None
    assert within.ranks == between.ranks == 2 and min(within.bandwidth, between.latency) > 0
