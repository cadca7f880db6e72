"""A data source and a pipeline schedule of a user's own, each one file, through the real script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.launch import REPO, records, run

SCRIPT = "pretrain_cdrmix.py"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a short run on both, of which the files stand in the configuration."""
    folder = tmp_path_factory.mktemp("own")
    own = [REPO / "tests" / "toys" / name for name in ("counting_source.py", "latest_first_schedule.py")]
    (folder / "run.yaml").write_text(f"base: cdrmix-test\ntraining:\n  extensions: [{own[0]}, {own[1]}]\n")
    return (
        *("--config", str(folder / "run.yaml"), "--vocab-size", "64", "--device", "cpu", "--seq-length", "16"),
        *("--data-path", "counting://3", "--global-batch-size", "8", "--train-iters", "6", "--log-interval", "1"),
        *("--rampup-batch-size", "2", "2", "12", "--micro-batch-size", "1"),
        *("--lr", "1e-2", "--lr-decay-style", "constant", "--eval-iters", "1"),
    )


def test_a_run_on_them_goes_on_at_another_layout(line: tuple[str, ...], tmp_path: Path) -> None:
    save, metrics = tmp_path / "run", tmp_path / "whole.jsonl"
    two = ("--pp", "2", "--pipeline-schedule", "latest-first", "--save", str(save), "--save-interval", "3")
    whole = run(2, SCRIPT, *line, *two, "--metrics-file", str(metrics))
    assert whole.status == 0, whole.err
    assert "counting by 3\n" in whole.err and "pp 2 (latest-first)" in whole.out
    resumed = run(2, SCRIPT, *line, "--load", str(save / "step_0000003"), "--metrics-file", str(tmp_path / "rest"))
    assert resumed.status == 0, resumed.err
    expected = [record for record in records(metrics) if record["iteration"] > 3]
    found = records(tmp_path / "rest")
    assert [r["kind"] for r in found] == ["step", "step", "step", "evaluation"]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]
    assert [record.get("global_batch_size") for record in records(metrics)] == [2, 2, 4, 6, 8, 8, None]
    assert "2 to 8 x 16 tokens a step" in whole.out and "| batch 6 |" in whole.out
    assert found[-1]["loss"] < records(metrics)[0]["loss"] - 1, "counting is learned"


def test_what_cannot_be_is_refused_by_name(line: tuple[str, ...]) -> None:
    outcome = run(1, SCRIPT, *line, "--data-path", "counting://x")
    assert outcome.status == 2 and "--data-path counting://x: counting:// is followed by a number" in outcome.err
