"""A learning-rate schedule that a user adds as one file, through the real script."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

TOY = REPO / "tests" / "toys" / "waves_schedule.py"


def test_a_schedule_is_one_file(flags: tuple[str, ...], tmp_path: Path) -> None:
    metrics, save = tmp_path / "m.jsonl", str(tmp_path / "run")
    line = (*flags, "--extensions", str(TOY), "--lr-decay-style", "waves", "--lr", "1e-3", "--lr-warmup-iters", "2")
    more = ("--save", save, "--load", save, "--metrics-file", str(metrics))
    first = run(1, "pretrain_cdrmix.py", *line, *more, "--train-iters", "3")
    assert first.status == 0, first.err
    second = run(1, "pretrain_cdrmix.py", *line, *more, "--train-iters", "5")
    assert second.status == 0, second.err
    rates = [record["lr"] for record in records(metrics) if record["kind"] == "step"]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (1 + 0.1 * math.sin(i)) for i in (3, 4, 5))], rel=1e-12)
