"""What checkpoints in the making and snapshots take of host memory is what a run writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megaforge.checkpoint.background import BackgroundSave
from megaforge.parallel.context import ParallelContext
from megaforge.planning.host_copies import host_copies
from megaforge.planning.layout import layout_of
from megaforge.planning.plan_command import run
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.state_bytes import checkpoint_bytes
from megaforge.training.checkpointing import run_snapshot
from megaforge.training.state_copy import StateCopy
from tests.training.tiny import arguments, make_trainer, write_dataset

RANDOM = 20_000  # bytes of random states at most


@pytest.mark.parametrize("more", [("--ema-decay", "0.9"), ("--bf16", "--optimizer", "muon"), ("--optimizer", "sgd")])
def test_the_bytes_of_a_rank_are_those_that_it_writes(tmp_path: Path, more: tuple[str, ...]) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    trainer = make_trainer(arguments(prefix, *more))
    written = BackgroundSave(ParallelContext.single()).own_bytes(run_snapshot(trainer))
    config = trainer.config
    layout = layout_of(config, 1)
    parts = model_parts(config.model, layout.dtype)
    planned = checkpoint_bytes(parts, cut_stages(parts, layout), layout)
    assert planned <= written <= planned + RANDOM
    for zero in (0, 1):
        halves = dataclasses.replace(layout, world_size=2, zero=zero)
        assert checkpoint_bytes(parts, cut_stages(parts, halves), halves) == pytest.approx(planned / 2, rel=0.01)
    assert host_copies(config, parts, layout) == {}
    both = dataclasses.replace(layout, world_size=2, zero=0)
    back = dataclasses.replace(config, resilience=dataclasses.replace(config.resilience, spike_rollback=5))
    assert host_copies(back, parts, both) == {"--spike-rollback": 2 * planned}
    copy = StateCopy()
    copy.take(trainer)
    assert planned <= copy.nbytes <= planned + RANDOM
    flags = dataclasses.replace(config.resilience, snapshot_interval=5, snapshot_peers=True)
    saving = dataclasses.replace(config.checkpoint, save="x", async_save=True)
    copies = host_copies(dataclasses.replace(config, resilience=flags, checkpoint=saving), parts, layout)
    assert list(copies.values()) == [planned, 3 * planned, 2 * planned]


def test_the_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--save", "r", "--load", "r", "--async-save", "--snapshot-interval", "20")
    run(["--config", "cdrmix-tiny", "--vocab-size", "512", "--gpus", "1", "--gpu", "h100-80g", *where])
    assert "copies in host memory: 0." in (text := capsys.readouterr().out) and "(--async-save 0." in text
