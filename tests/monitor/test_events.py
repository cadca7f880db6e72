"""The events of a run: whole lines whatever happens, and readers that pass nothing over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.monitor import events
from megaforge.monitor.events import EventLog, read_events


def test_events_are_appended_in_order_over_attempts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path, lambda: 3).tell("skip", reason="spike", samples=[4, 5], loss=float("nan"), deep={"a": (1.5,)})
    EventLog(path, lambda: 7).tell("end", complete=True)
    (skip, end), torn = read_events(path)
    assert torn is None
    assert (skip["kind"], skip["iteration"], skip["samples"]) == ("skip", 3, [4, 5])
    assert skip["loss"] is None and skip["deep"] == {"a": [1.5]}
    assert (end["kind"], end["iteration"], end["complete"]) == ("end", 7, True)
    assert 0 < skip["uptime"] <= end["uptime"]


def test_ranks_without_a_file_write_nothing(tmp_path: Path) -> None:
    EventLog().tell("skip", reason="spike")
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_logs_own_is_refused() -> None:
    with pytest.raises(ValueError, match="'time'"):
        EventLog().tell("skip", time=1)


def test_a_torn_last_line_is_cut_and_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).tell("start")
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "ki')
    assert read_events(path).torn == '{"time": 1.0, "ki'
    EventLog(path).tell("start")
    found = read_events(path)
    assert [event["kind"] for event in found.events] == ["start", "mended", "start"]
    assert found.events[1]["cut"] == '{"time": 1.0, "ki'


def test_a_first_line_cut_short_is_mended_and_a_foreign_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"ti')
    EventLog(path)
    assert [event["kind"] for event in read_events(path).events] == ["mended"]
    path.write_bytes(b"my notes")
    with pytest.raises(UserError, match="not a file of events"):
        EventLog(path)
    assert path.read_bytes() == b"my notes"


def test_a_disk_that_takes_half_a_line_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.tell("start")
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(events.os, "write", lambda descriptor, line: write(descriptor, line[:9]))
    log.tell("save")
    log.tell("save")
    assert path.read_bytes() == before
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    monkeypatch.undo()
    log.tell("end")
    assert [event["kind"] for event in read_events(path).events] == ["start", "end"]


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"time": 1, "kind": 2, "iteration": 0, "uptime": 0}', '{"time": true, "kind": "start"}', ""]
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    whole = json.dumps({"time": 1.0, "kind": "start", "iteration": 0, "uptime": 0.5})
    path.write_text(f"{whole}\n{line}\n{whole}\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not"):
        read_events(path)


def test_the_disk_has_a_line_before_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, fsync = tmp_path / "events.jsonl", list[tuple[str, bytes]](), os.fsync

    def watched(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, path.read_bytes() if os.path.isfile(name) else b""))
        fsync(descriptor)

    monkeypatch.setattr(events.os, "fsync", watched)
    log = EventLog(path)
    log.tell("start")
    assert synced == [(str(path), path.read_bytes()), (str(tmp_path), b"")], "its name too, once"
    log.tell("end")
    assert synced[2:] == [(str(path), path.read_bytes())]


def test_a_line_without_its_end_is_not_appended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without its end"):
        events.append_line(tmp_path / "events.jsonl", b'{"event": "a"}')
    assert list(tmp_path.iterdir()) == []
