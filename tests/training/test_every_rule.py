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
from megaforge.planning.memory import state_bytes
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.stages import StagePart, model_parts, stage_parameters
from megaforge.registry import UPDATE_RULES, Registry
from megaforge.verification.dry_run import _agree, _registered
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


def run_twice(argv: list[str], folder: str) -> dict[str, Any]:
    """Three steps, and the last one again from a checkpoint."""
    whole = trainer_of([*argv, "--save", folder, "--save-interval", "2"])
    recorder = record(whole)
    whole.train()
    resumed = trainer_of([*argv, "--save", folder, "--load", f"{folder}/step_0000002"])
    again = record(resumed)
    resumed.train()
    pairs = zip(whole.optimizer.entries(), resumed.optimizer.entries(), strict=True)
    layout = planned_layout(whole.config, 4)
    parts = model_parts(whole.config.model, layout.dtype)
    held = stage_parameters(parts, [StagePart(range(len(parts.blocks)), True, True)])
    return {
        "records": recorder.records,
        "again": again.records,
        "differ": [name for (name, _, one), (other, _, two) in pairs if name != other or not torch.equal(one, two)],
        "held": _registered(whole.model, whole.engine.reducer, whole.optimizer),
        "agree": _agree(
            _registered(whole.model, whole.engine.reducer, whole.optimizer),
            state_bytes(held, whole.ctx, layout),
            layout,
        ),
    }


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
        assert one["agree"], one["held"]
