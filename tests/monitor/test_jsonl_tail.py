"""A followed file gives each record once, whatever its writers do to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megaforge.monitor.jsonl_tail import JsonlTail
from megaforge.monitor.sinks import JsonlSink


def test_records_come_once_and_a_line_that_is_being_written_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = JsonlTail(path)
    assert tail.read() == [] and tail.missing and not tail.again
    path.write_bytes(b'{"a": 1}\n{"a":')
    assert tail.read() == [{"a": 1}] and not tail.missing
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(b" 2}\n")
    assert tail.read() == [{"a": 2}] and not tail.again and tail.unreadable == 0


def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n\n' + b"[" * 9999 + b'\n{"a": 2}\n')
    tail = JsonlTail(path)
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.unreadable == 4


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
def test_a_large_file_is_read_in_several_goes(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"iteration": i, "text": "x" * (i % 40)} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tail, found, goes = JsonlTail(path), [], 0
    while True:
        new = tail.read(limit)
        assert tail.taken > 0 or not new
        found += new
        goes += 1
        if not tail.behind:
            break
    assert found == records
    assert goes > 1 or limit == 1000 or path.stat().st_size < limit
    assert tail.read(limit) == []


def test_what_a_resumed_run_takes_back_is_void(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, None)
    for iteration in range(1, 7):
        first.write("step", iteration, {"loss": 1.0 / iteration})
    first.close()
    tail = JsonlTail(path)
    assert len(tail.read()) == 6
    second = JsonlSink(path, 4)  # iterations 5 and 6 go, and are made again with other numbers
    for iteration in range(5, 9):  # the file is longer now than it was
        second.write("step", iteration, {"loss": 2.0 / iteration})
    again = tail.read()
    assert tail.again and [record["iteration"] for record in again] == list(range(1, 9))
    assert again[4]["loss"] == 2.0 / 5
    second.write("step", 9, {"loss": 1.0})
    assert [record["iteration"] for record in tail.read()] == [9] and not tail.again


def test_a_replaced_and_a_deleted_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text('{"a": 1}\n')
    tail = JsonlTail(path)
    tail.read()
    other.write_text('{"a": 1}\n')
    os.replace(other, path)
    assert tail.read() == [{"a": 1}] and tail.again
    path.unlink()
    assert tail.read() == [] and tail.again and tail.missing
    assert tail.read() == [] and not tail.again
    path.write_text('{"a": 3}\n')
    assert tail.read() == [{"a": 3}] and not tail.again and not tail.missing
