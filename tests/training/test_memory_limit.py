"""A peak above ``--memory-limit`` is told, with what would need less."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megaforge.device import host_memory_bytes, memory_share, peak_memory_bytes
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.training import memory_limit
from megaforge.training.memory_limit import Advice, MemoryLimit
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool


def watch(shares: list[float], patch: pytest.MonkeyPatch, advice: Advice | None = None) -> list[tuple[int, Any]]:
    """The events of a run whose memory is so full at each interval of two steps."""
    told: list[tuple[int, Any]] = []
    callback = MemoryLimit(0.5, 2, advice)
    trainer = SimpleNamespace(ctx=ParallelContext.single())
    trainer.events = SimpleNamespace(tell=lambda kind, **fields: told.append((iteration, (kind, fields))))
    callback.on_train_start(cast(Trainer, trainer))
    for iteration, share in enumerate([each for given in shares for each in (2.0, given)], start=1):
        patch.setattr(memory_limit, "memory_share", lambda device, ranks, share=share: share)
        metrics = StepMetrics(iteration, 1.0, 1.0, 1.0, 1, 1, 1)
        callback.on_step_end(cast(Trainer, trainer), metrics)
        assert metrics.extra == ({} if iteration % 2 else {"memory_share": share})
    return told


def test_a_rise_above_the_limit_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        told = watch([0.5, 0.52, 0.525, 0.6, 0.6], monkeypatch, lambda: ["--zero 1 saves 3 of 9 GB"])
    assert [iteration for iteration, _ in told] == [4, 8]
    advice = ["--zero 1 saves 3 of 9 GB"]
    assert told[0][1] == ("memory", {"share": 0.52, "limit": 0.5, "rank": 0, "advice": advice})
    words = (
        "the memory of rank 0 was 60% full, above --memory-limit 0.5; to need less a rank, by the plan: --zero 1 saves"
    )
    assert words in caplog.text


def test_a_plan_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> list[str]:
        raise UserError("impossible")

    assert [fields["advice"] for _, (_, fields) in watch([0.9], monkeypatch, fails)] == [[]]
    assert "no advice on memory: UserError: impossible" in caplog.text


def _fullest_of_two() -> tuple[float, int]:
    ctx = ParallelContext.create()
    return memory_limit._fullest(ctx, [0.25, 0.75][ctx.world.rank])


def test_the_fullest_rank_is_found(ranks: RankPool) -> None:
    assert ranks.run(2, _fullest_of_two) == [(0.75, 1)] * 2


def test_ranks_of_a_machine_share_its_memory() -> None:
    cpu = torch.device("cpu")
    alone = memory_share(cpu, 1)
    assert 0 < alone < 1 and memory_share(cpu, 4) >= 4 * alone
    assert peak_memory_bytes(cpu) < host_memory_bytes()
