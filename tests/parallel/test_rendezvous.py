"""Ranks that start on a store with an earlier start's leavings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from megaforge.parallel.rendezvous import agree_on_start

SOON = timedelta(minutes=5)


def start(store: HashStore, world_size: int) -> set[str]:
    """The names that the ranks of one start agree on; rank 0 comes last but one."""
    order = [*range(2, world_size), 0, *range(1, min(world_size, 2))]
    with ThreadPoolExecutor(world_size) as pool:
        names = [pool.submit(agree_on_start, store, rank, world_size, SOON) for rank in order]
        return {name.result() for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_start_has_one_name_of_its_own(world_size: int) -> None:
    store = HashStore()
    names = [start(store, world_size) for _ in range(3)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 3


def test_what_a_start_left_that_died_half_way_misleads_nobody() -> None:
    """Rank 2 came and died before rank 0 answered; rank 1's answer was never taken."""
    store = HashStore()
    with pytest.raises(RuntimeError):
        agree_on_start(store, 2, 3, timedelta(milliseconds=1))
    store.set("came/1", "dead")
    with pytest.raises(RuntimeError, match="2 of 3 ranks have not come within 0 s"):
        agree_on_start(store, 0, 3, timedelta(0))
    left = store.get("answer/dead").decode()
    names = start(store, 3)
    assert len(names) == 1 and left not in names
