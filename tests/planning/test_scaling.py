"""``tools/plan.py scaling``: the same run on more GPUs."""

from __future__ import annotations

import pytest

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.planning.gpus import GPUS
from megaforge.planning.layout import layout_of
from megaforge.planning.plan_command import run as run_memory
from megaforge.planning.scaling import run, scaling_curve

H100 = GPUS["h100-80g"]
SMALL = ["--config", "cdrmix-test", "--vocab-size", "500", "--micro-batch-size", "1", "--zero", "1"]


@pytest.mark.parametrize("weak", [False, True])
def test_each_point_is_the_plan_of_its_size(weak: bool) -> None:
    config = parse_config([*SMALL, "--global-batch-size", "16"]).config
    points = scaling_curve(config, [2, 4, 8], H100, weak=weak)
    assert [point.layout.global_batch_size for point in points] == ([16, 32, 64] if weak else [16, 16, 16])
    assert [point.layout.micro_batches for point in points] == ([8, 8, 8] if weak else [8, 4, 2])
    each = [point.time.tokens_per_second / point.layout.world_size for point in points]
    assert [point.efficiency for point in points] == pytest.approx([rate / each[0] for rate in each])
    assert points[0].overhead == 0 and points[1].overhead == pytest.approx(1 / points[1].efficiency - 1)
    strong = scaling_curve(config, [2], H100, weak=False)[0]
    assert points[0].layout == strong.layout == layout_of(config, 2)


def test_small_batches_scale_worse_and_zero_needs_less_of_each() -> None:
    config = parse_config([*SMALL, "--global-batch-size", "16"]).config
    strong, weak = (scaling_curve(config, [1, 16], H100, weak=weak) for weak in (False, True))
    assert strong[1].efficiency < weak[1].efficiency
    assert strong[1].memory.state.optimizer < strong[0].memory.state.optimizer / 8


def test_the_table_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    run([*SMALL, "--global-batch-size", "16", "--gpus", "4", "2", "--gpu", "a100-80g"])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["2", "4"] and rows[0][6:8] == ["100.0%", "0.0%"]
    assert "strong scaling" in text and "assumed: a100-80g" in text
    run_memory([*SMALL, "--global-batch-size", "16", "--gpus", "4", "--gpu", "a100-80g"])
    assert f"predicted {rows[1][5]} tokens/s" in capsys.readouterr().out


def test_a_size_that_the_layout_does_not_fit_is_refused() -> None:
    config = parse_config([*SMALL, "--global-batch-size", "4"]).config
    with pytest.raises(UserError, match="is not divisible by --micro-batch-size 1 x dp 8"):
        scaling_curve(config, [2, 8], H100, weak=False)
