from __future__ import annotations

import itertools

import pytest

from megaforge.data.dealing import Dealing, dealt


def test_equal_speeds_deal_as_ever() -> None:
    counts = Dealing(3).counts(12)
    assert counts == [4, 4, 4]
    assert [dealt(counts, rank) for rank in range(3)] == [list(range(rank, 12, 3)) for rank in range(3)]


def test_every_micro_batch_has_one_rank() -> None:
    for counts in itertools.product((1, 2, 5), repeat=3):
        own = [dealt(counts, rank) for rank in range(3)]
        assert [len(one) for one in own] == list(counts)
        assert sorted(itertools.chain(*own)) == list(range(sum(counts)))


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (1.0, 1e-6, 1.0), (1.0, 1.0001, 1e6), (5, 3, 2)])
@pytest.mark.parametrize("total", [3, 4, 10])
def test_the_slowest_is_as_early_as_can_be(speeds: tuple[float, ...], total: int) -> None:
    def through(counts: tuple[int, ...] | list[int]) -> float:
        return max(count / speed for count, speed in zip(counts, speeds, strict=True))

    counts = Dealing(3).counts(total, speeds)
    assert sum(counts) == total and min(counts) >= 1
    others = (one for one in itertools.product(range(1, total), repeat=3) if sum(one) == total)
    assert through(counts) == min(map(through, others))


def test_ranks_that_share_experts_and_schedules_in_rounds() -> None:
    dealing = Dealing(4, span=2, unit=2)
    assert dealing.counts(16, (3.0, 1.0)) == [6, 6, 2, 2] and dealing.counts(16) == [4] * 4
    for count in (4, 10, 18):
        with pytest.raises(ValueError, match=f"{count} micro-batches for 4 ranks, 2 x 2 at once"):
            dealing.counts(count)
    with pytest.raises(ValueError, match="each has to be positive"):
        dealing.counts(16, (3.0, 0.0))
    with pytest.raises(ValueError, match="3 ranks"):
        Dealing(3, span=2)
