"""The JSONL sink: exact numbers, exact truncation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.monitor.sinks import JsonlSink, read_metrics


def write_steps(path: Path, first: int, last: int, resume: int) -> None:
    sink = JsonlSink(path, resume)
    for iteration in range(first, last + 1):
        sink.write("step", iteration, {"loss": math.pi / iteration})
        if iteration % 2 == 0:
            sink.write("evaluation", iteration, {"loss": math.e / iteration})
    sink.close()


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    write_steps(tmp_path / "m.jsonl", 1, 3, 0)
    steps = [r for r in read_metrics(tmp_path / "m.jsonl") if r["kind"] == "step"]
    assert [r["loss"] for r in steps] == [math.pi, math.pi / 2, math.pi / 3]
    assert [r["iteration"] for r in steps] == [1, 2, 3]


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole.jsonl", 1, 9, 0)
    write_steps(tmp_path / "cut.jsonl", 1, 7, 0)
    with (tmp_path / "cut.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "iter')  # the line that the kill interrupted
    write_steps(tmp_path / "cut.jsonl", 5, 9, 4)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_evaluation_of_the_resumed_iteration_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 5, 0)
    JsonlSink(path, 4).close()
    assert [(r["kind"], r["iteration"]) for r in read_metrics(path)][-2:] == [("step", 4), ("evaluation", 4)]


def test_a_fresh_run_puts_an_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 2, 0)
    before = path.read_bytes()
    write_steps(path, 1, 1, 0)
    assert (tmp_path / "m.jsonl.old").read_bytes() == before
    assert len(read_metrics(path)) == 1


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    with pytest.raises(UserError, match="notes.txt: line 1 is no metrics record"):
        JsonlSink(path, 3)
    assert path.read_text() == "buy milk\n"


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.write("step", 1, {"grad_norm": math.inf, "loss": math.nan})
    sink.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "kind": "step",
        "iteration": 1,
        "grad_norm": None,
        "loss": None,
    }


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--metrics-file .*file/m.jsonl"):
        JsonlSink(tmp_path / "file" / "m.jsonl", 0)
