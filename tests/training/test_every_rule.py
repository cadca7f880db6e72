"""Every update rule and schedule by its flag at tp 2, dp 2, zero 1: it trains, resumes bit for bit, and takes the bytes
that are planned. What is registered is tested; what needs another flag beside it has it here."""

from __future__ import annotations

import math
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.config.schema import settings
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.stages import StagePart, model_parts
from megaforge.planning.state_bytes import StateBytes, state_bytes
from megaforge.registry import UPDATE_RULES, Registry
from megaforge.training.ema import WeightAverage
from megaforge.training.trainer import Trainer
from megaforge.verification.dry_run import held_bytes
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, record, write_dataset

_styles = settings()["optimizer.lr_decay_style"].choices
STYLES = _styles.names() if isinstance(_styles, Registry) else _styles
RULES = UPDATE_RULES.names()
PAIRS = max(len(RULES), len(STYLES))
INT8 = ("--extensions", str(Path(__file__).parents[1] / "toys" / "int8_linear.py"), "--converters", "int8")
BESIDE: dict[str, tuple[str, ...]] = {
    "sgd": ("--lr", "0.1"),
    "cosine-restarts": ("--lr-restart-iters", "2"),
    "plateau": ("--eval-iters", "1", "--eval-interval", "1", "--lr-plateau-patience", "0"),
    "qat_adam": (*INT8, "--qat-damping", "1"),
    "qat_sgd": (*INT8, "--qat-damping", "1", "--lr", "0.1"),
}
LAYOUT = ("--tp", "2", "--zero", "1")
SIZES = ("--hidden-size", "64", "--ffn-hidden-size", "128", "--rwkv-head-size", "16")


def weighed(trainer: Trainer) -> tuple[StateBytes, StateBytes]:
    """What this rank holds, and what is planned."""
    layout = planned_layout(trainer.config, trainer.ctx.world.size)
    parts = model_parts(trainer.config.model, layout.dtype)
    stages = [StagePart(range(len(parts.blocks)), True, True)]
    kept = trainer.engine.filter
    more = [[] if kept is None else [kept.kept]]
    more += [callback.averages for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
    return held_bytes(trainer.model, trainer.optimizer, *more), state_bytes(parts, stages, layout, trainer.ctx)


def run_twice(argv: list[str], folder: str) -> dict[str, Any]:
    """Three steps, and the last one again from a checkpoint."""
    whole = trainer_of([*argv, "--save", folder, "--save-interval", "2"])
    recorder = record(whole)
    whole.train()
    resumed = trainer_of([*argv, "--save", folder, "--load", f"{folder}/step_0000002"])
    again = record(resumed)
    resumed.train()
    pairs = zip(whole.optimizer.entries(), resumed.optimizer.entries(), strict=True)
    return {
        "records": recorder.records,
        "again": again.records,
        "differ": [name for (name, _, one), (other, _, two) in pairs if name != other or not torch.equal(one, two)],
        "bytes": weighed(whole),
    }


def bytes_of(runs: list[list[str]]) -> list[tuple[StateBytes, StateBytes]]:
    """What this rank holds after a step of each run, and what is planned."""
    return [weighed(trainer) for trainer in map(trainer_of, runs) if trainer.train() is None]


def test_bytes_are_as_planned_at_every_stage(ranks: RankPool, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    small = ("--train-iters", "1", "--global-batch-size", "2", "--micro-batch-size", "1", "--ddp-bucket-size", "9000")
    beside = ("--bf16", "--ema-decay", "0.9", "--grokfast", "ema", "--eval-iters", "0")
    runs = [
        arguments(prefix, *small, *beside, "--optimizer", rule, *BESIDE.get(rule, ()), "--zero", zero)
        for rule in RULES
        for zero in ("0", "1", "2")
    ]
    for rank in ranks.run(2, bytes_of, runs):
        for run, (held, planned) in zip(runs, rank, strict=True):
            assert held == planned, " ".join(run)


@pytest.mark.parametrize(
    ("rule", "style"), list(islice(zip(cycle(RULES), cycle(STYLES), strict=False), PAIRS)), ids=str
)
def test_trains_resumes_and_takes_the_bytes_that_are_planned(
    ranks: RankPool, tmp_path: Path, rule: str, style: str
) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    chosen = ("--optimizer", rule, "--lr-decay-style", style, "--train-iters", "3", "--log-interval", "9")
    argv = arguments(prefix, *chosen, *BESIDE.get(rule, ()), *BESIDE.get(style, ()), *SIZES, *LAYOUT)
    for one in ranks.run(4, run_twice, argv, str(tmp_path / "run")):
        losses = [entry["loss"] for entry in one["records"] if entry["kind"] == "step"]
        assert len(losses) == 3 and all(map(math.isfinite, losses)) and min(losses[1:]) < losses[0]
        assert one["again"] == [entry for entry in one["records"] if entry["iteration"] > 2] and one["differ"] == []
        held, planned = one["bytes"]
        assert held == planned
