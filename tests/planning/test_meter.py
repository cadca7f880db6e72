"""Bytes of storages that are alive, and what a run on the meta device makes up."""

from __future__ import annotations

import pytest
import torch

from megaforge.planning.meter import MetaRun, StorageMeter


def test_the_meter_counts_storages_once_and_forgets_freed_ones() -> None:
    parameter = torch.zeros(100)
    with StorageMeter([parameter]) as meter:
        first = parameter + 1
        view = first[10:]
        second = view * 2
        assert meter.live == 400 + 360
        del first, view
        assert meter.live == 360
        del second
    assert (meter.live, meter.peak) == (0, 760)


@pytest.mark.parametrize(("interval", "between"), [(64, 2 * 3 * 2 * 8 * 8 * 4), (16, 0)])
def test_states_that_a_gpu_computes_again_are_alive_beside_the_gradients(interval: int, between: int) -> None:
    """Those between two kept ones, where few are kept."""
    inputs = [torch.empty(128, 3, 2, 8, dtype=torch.bfloat16, device="meta") for _ in range(6)]
    y, _, states, removed = torch.ops.megaforge.wkv7(*inputs, None, None, interval, False)
    with MetaRun([*inputs, y, states, removed]) as run:
        gradients = torch.ops.megaforge.wkv7_backward(*inputs, None, states, removed, y, None, interval)
    made = sum(gradient.nbytes for gradient in gradients)
    assert (run.live, run.peak) == (made, made + between)


@pytest.mark.parametrize(("assignments", "experts"), [(12, 4), (10, 4), (3, 4), (0, 4), (7, 1)])
def test_tokens_spread_evenly_over_experts_and_none_is_lost(assignments: int, experts: int) -> None:
    with MetaRun() as run:
        run.num_experts, run.assignments = experts, assignments
        # Own counts, and those that arrive from two ranks.
        counts = torch.zeros(3 * experts, dtype=torch.int64, device="meta").tolist()
    for rank in range(3):
        own = counts[rank * experts : (rank + 1) * experts]
        assert sum(own) == assignments
        assert max(own) - min(own) <= 1
