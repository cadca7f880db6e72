"""Every supported torch has the collectives, and none warns of their names."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megaforge.parallel import collectives
from tests.parallel.pool import RankPool


def exchanged(rank_count: int) -> tuple[list[float], list[float], list[str]]:
    mine = torch.arange(2.0) + 10 * dist.get_rank()
    gathered, summed = torch.empty(2 * rank_count), torch.empty(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collectives.all_gather_single(gathered, mine)
        work = collectives.reduce_scatter_single(summed, mine, async_op=True)
        assert work is not None
        work.wait()
    return gathered.tolist(), summed.tolist(), [str(w.message) for w in caught if "deprecated" in str(w.message)]


def test_they_exchange_without_a_warning(ranks: RankPool) -> None:
    for rank, (gathered, summed, complaints) in enumerate(ranks.run(2, exchanged, 2)):
        assert gathered == [0, 1, 10, 11]
        assert summed == [10 + 2 * rank]
        assert complaints == []


def test_an_older_torch_has_them_under_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "dist", SimpleNamespace(old=len))
    assert collectives._first("new", "old") is len
