"""A run whose experts are spread out, its checkpoint, and its continuation on one rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaforge.nn.moe import Router
from megaforge.parallel.context import ParallelContext
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset

BALANCED = (
    *("--fp64", "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.5", "--train-iters", "4"),
)


def train(
    prefix: str, sizes: dict[str, int], more: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The records of a run, and the routers' state at its end."""
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    ctx = ParallelContext.create(**sizes)
    launched = {"RANK": ctx.world.rank, "WORLD_SIZE": ctx.world.size, "LOCAL_RANK": ctx.world.rank}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        trainer = make_trainer(arguments(prefix, *BALANCED, *flags, *more), ctx)
    recorder = record(trainer)
    trainer.train()
    return recorder.records, {n: t for n, t in weights(trainer).items() if ".router." in n and "weight" not in n}


def test_training_saving_and_going_on_elsewhere(ranks: RankPool, tmp_path: Path) -> None:
    """Two steps folded over tp x dp, then two on one rank, are four steps on one rank; router state included."""
    prefix, folder = write_dataset(tmp_path / "train_text_document"), str(tmp_path / "run")
    expected, state = train(prefix, {}, ())
    first = ranks.run(
        4, train, prefix, {"tp": 2, "ep": 4, "etp": 1}, ("--sp", "--exit-interval", "2", "--save", folder)
    )
    second, resumed = train(prefix, {}, ("--load", folder))
    got = [r for r in first[0][0] + second if r["kind"] == "step"]
    for ours, theirs in zip(got, [r for r in expected if r["kind"] == "step"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name
    assert set(state) == {f"layers.{i}.ffn.router.{n}" for i in (0, 1) for n in ("expert_bias", "previous_load")}
    for name, tensor in state.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-12, atol=0)
        assert not torch.equal(tensor, torch.full_like(tensor, 0.0 if "bias" in name else 0.25))


def test_a_skipped_step_leaves_the_routers_alone(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    flags = [flag for flag in BALANCED if flag != "--fp64"]
    trainer = make_trainer(arguments(prefix, *flags, "--fp16", "--initial-loss-scale", "1e38", "--train-iters", "1"))
    trainer.train()
    for router in (module for module in trainer.model.modules() if isinstance(module, Router)):
        assert router.expert_bias is not None and not router.expert_bias.any()
