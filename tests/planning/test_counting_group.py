"""Groups without peers: a layer's own collectives run, and what a ring would send is counted by axis."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import distributed_c10d

from megaforge.parallel.context_parallel.shard import ring
from megaforge.parallel.expert_dispatch import TokenDispatcher
from megaforge.parallel.mappings import (
    copy_to_tensor_parallel,
    gather_from_context_parallel,
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
)
from megaforge.planning.counting_group import counting_context


@pytest.mark.parametrize("ranks", [2, 4])
def test_rings_send_what_they_send(ranks: int) -> None:
    with counting_context("meta", True, tp=ranks, cp=ranks, ep=1) as (ctx, sent):
        x = torch.zeros(8, 4, device="meta", requires_grad=True)  # 128 bytes
        reduce_from_tensor_parallel(x, ctx.tp).sum().backward()
        assert sent == {"tp": 2 * 128 * (ranks - 1) / ranks}  # and nothing on the way back
        copy_to_tensor_parallel(x, ctx.tp).sum().backward()
        assert sent["tp"] == 4 * 128 * (ranks - 1) / ranks  # nothing on the way there
        gathered = gather_from_sequence_parallel(x, ctx.tp)
        assert gathered.shape == (8 * ranks, 4)
        assert sent["sp"] == 128 * (ranks - 1)
        gathered.sum().backward()
        assert sent["sp"] == 2 * 128 * (ranks - 1)
        gather_from_context_parallel(x, ctx.cp)
        assert sent["cp"] == 128 * (ranks - 1)
        assert len(list(ring(x.detach(), ctx.cp))) == ranks
        assert sent["cp"] == 2 * 128 * (ranks - 1)


def test_without_sequence_parallelism_gathers_over_tp_are_of_tp() -> None:
    with counting_context("meta", False, tp=2) as (ctx, sent):
        gather_from_sequence_parallel(torch.zeros(8, device="meta"), ctx.tp)
    assert sent == {"tp": 32}


def test_rows_travel_over_ep() -> None:
    with counting_context("cpu", False, ep=4) as (ctx, sent):
        dispatcher = TokenDispatcher(4, ctx.ep, ctx.etp)
        assert dispatcher._exchange_counts(torch.tensor([1, 2, 3, 4])).shape == (1, 4, 1)
        assert sent == {"ep": 4 * 8 * 3 / 4}


def test_axes_of_one_send_nothing_and_groups_are_forgotten() -> None:
    before = dict(distributed_c10d._world.pg_group_ranks)
    with counting_context("meta", True, tp=1, cp=2) as (ctx, sent):
        reduce_from_tensor_parallel(torch.zeros(8, device="meta"), ctx.tp)
        assert sent == {}
        assert ctx.cp.size == 2 and ctx.dp.size == 1
    assert distributed_c10d._world.pg_group_ranks == before
