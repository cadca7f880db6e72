"""A run at --zero 2 over two ranks, stopped and continued by one rank without ZeRO, is the run of one rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megaforge.inference.restore import load_trained_model
from megaforge.parallel.context import ParallelContext
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from tests.training.tiny import arguments, make_config, make_trainer, record, write_dataset

MORE = ("--fp64", "--eval-iters", "2", "--eval-interval", "2", "--micro-batch-size", "1", "--ddp-bucket-size", "3000")


def run_as_rank(argv: list[str]) -> list[dict[str, Any]]:
    """Trains as one of the ranks of the default process group; returns what the sinks got."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    before = {name: os.environ.get(name) for name in world}
    os.environ.update(world)  # `prepare` asks the launcher's variables how many ranks there are
    try:
        trainer = build_trainer(prepare(make_config(argv)), ParallelContext.create())
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    recorder = record(trainer)
    trainer.train()
    return recorder.records


@pytest.mark.parametrize("zero", ["1", "2"])
def test_a_run_crosses_stages_and_ranks(ranks, tmp_path: Path, zero: str) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    alone = make_trainer(arguments(prefix, *MORE))
    expected = record(alone)
    alone.train()
    save = str(tmp_path / "run")
    sharded = arguments(prefix, *MORE, "--zero", zero, "--save", save)
    results = ranks.run(2, run_as_rank, [*sharded, "--exit-interval", "2"])
    middle = make_trainer(arguments(prefix, *MORE, "--save", save, "--load", save, "--exit-interval", "4"))
    resumed = record(middle)
    middle.train()
    results_after = ranks.run(2, run_as_rank, [*sharded, "--load", save])
    for rank in range(2):
        found = results[rank] + resumed.records + results_after[rank]
        assert len(found) == len(expected.records) == 9
        for ours, theirs in zip(found, expected.records, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert ours[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key
    trained = load_trained_model(save, device="cpu")
    assert trained.config.parallel.zero_stage == 0 and trained.meta["iteration"] == 6
