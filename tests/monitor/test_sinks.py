"""The JSONL sink: exact numbers, exact truncation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.monitor.sinks import JsonlSink, read_metrics
from tests.disk_log import disk_log


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


def test_the_disk_has_what_a_checkpoint_follows_and_what_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "m.jsonl", disk_log(tmp_path, monkeypatch)
    sink = JsonlSink(path, 0)
    for iteration in (1, 2):
        sink.write("step", iteration, {"loss": 1.0})
    assert done == []
    sink.flush()
    assert done == [("fsync", "m.jsonl")]
    sink.go_back(1)
    sink.close()
    assert done[1:] == [("fsync", "m.jsonl.abandoned")] and iterations(path) == [1]


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path) if record["kind"] == "step"]


@pytest.mark.parametrize("first", [1, 3])
def test_a_new_run_follows_an_earlier_one(tmp_path: Path, first: int) -> None:
    """One row or several; what a later continuation takes out is its own run's, and goes aside."""
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, first, None)
    before = path.read_bytes()
    sink = JsonlSink(path, None)
    assert sink.notice is not None and "earlier runs" in sink.notice
    sink.close()
    write_steps(path, 1, 5, None)
    assert path.read_bytes().startswith(before)
    assert iterations(path) == [*range(1, first + 1), 1, 2, 3, 4, 5]
    sink = JsonlSink(path, 2)
    assert sink.notice is not None and "m.jsonl.abandoned" in sink.notice
    sink.close()
    assert iterations(path) == [*range(1, first + 1), 1, 2]
    assert iterations(tmp_path / "m.jsonl.abandoned") == [3, 4, 5]
    JsonlSink(path, 0).close()  # started anew by the line that continues
    assert path.read_bytes() == before
    assert iterations(tmp_path / "m.jsonl.abandoned") == [3, 4, 5, 1, 2]


@pytest.mark.parametrize("resume", [None, 0, 3])
@pytest.mark.parametrize(
    "content",
    [b"buy milk\n", b"no end of line", b'{"text": "a corpus"}\n', b'{"kind": "step", "iteration": "2"}\n', b"\n"],
)
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: bytes, resume: int | None) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="notes.txt: line 1 is not a metrics record"):
        JsonlSink(path, resume)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_refused_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs: is a directory; name a file"):
        JsonlSink(tmp_path / "runs", None)
    sink = JsonlSink("/dev/null", None)
    sink.write("step", 1, {"loss": 1.0})
    sink.flush()
    sink.close()


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


@pytest.mark.parametrize(
    "line",
    [
        *("[1, 2]", "7", "null", '{"kind": "step"}', '{"kind": "step", "iteration": "1", "loss": 2.0}'),
        *('{"kind": "evaluation", "iteration": 1, "loss": "x"}', '{"kind": "step", "iteration": 1, "tokens": [1]}'),
    ],
)
def test_a_line_that_is_not_a_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "step", "iteration": 1, "loss": null}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not a record of a run"):
        read_metrics(path)
