"""``tools/plan.py data``: the table and the picture of what is read when."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.planning.reading_plan import parse_data, run
from tests.data.datasets import write_dataset

TEXT = "sources: {a: {domain: web, max_epochs: 2}, b: {domain: code}}\ndomains: {web: 3, code: 1}\n"


def test_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [write_dataset(tmp_path / name, [[1, 2, 3, 4]] * count) for name, count in (("a", 12), ("b", 20))]
    file, picture = tmp_path / "own.yaml", tmp_path / "deep" / "read.svg"
    file.write_text(f"{TEXT}stretches: [{{samples: 8, seq_length: 2}}, {{}}]\n")
    given = ["--data-path", *data, "--split", "1", "--data-schedule", str(file), "--seq-length", "4"]
    run([*given, "--train-iters", "20", "--global-batch-size", "4", "--data-lanes", "2", "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["from", "sample", "samples", "seq", "length", "tokens", "a", "b"],
        ["0", "8", "2", "16", "75.0%", "(x0.25)", "25.0%", "(x0.05)"],
        ["8", "27", "4", "108", "75.0%", "(x2.00)", "25.0%", "(x0.35)"],
        ["35", "45", "4", "180", "0.0%", "(x2.00)", "100.0%", "(x2.60)"],
    ]
    assert lines[5] == "304 tokens in 80 samples" and lines[-1] == f"wrote {picture}"
    assert "<svg" in picture.read_text()


def test_a_schedule_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--data-schedule", "corpus/standard+reason", "--train-samples", "100", "--seq-length", "8"])
    head, names, row, total = capsys.readouterr().out.splitlines()
    assert head == "corpus/standard+reason: share of the tokens" and total == "800 tokens in 100 samples"
    assert names.split()[-2:] == ["long_context", "reasoning"] and row.split()[-6:-4] == ["48.0%", "16.0%"]


def test_ends_with_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, file = write_dataset(tmp_path / "a", [[1, 2, 3, 4]] * 12), tmp_path / "own.yaml"
    file.write_text("max_epochs: 1\n")
    run(["--data-path", prefix, "--split", "1", "--data-schedule", str(file), "--seq-length", "4"])
    assert capsys.readouterr().out.startswith("after 12 of 100 samples everything has been read as often")


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    for flags, complaint in (
        ((), "there is nothing to show: give --data-schedule"),
        (("--output", "x.gif", "--data-schedule", "corpus/standard"), "--output x.gif: its ending"),
        (("--data-path", str(tmp_path / "none")), "none.idx"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_data(flags, "plan.py data")
    file = tmp_path / "own.yaml"
    file.write_text("")
    with pytest.raises(UserError, match="weighs no domains: give --data-path"):
        run(["--data-schedule", str(file)])
