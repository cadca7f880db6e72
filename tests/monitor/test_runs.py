"""A run is what its files say, and a reader that is started again says the same."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.monitor.events import EventLog, process_birth
from megaforge.monitor.runs import Columns, Run, Status, process_is_there
from megaforge.monitor.sinks import JsonlSink

GONE = {"host": socket.gethostname(), "pid": 2**22 + 1, "born": 1.0}
HERE = {"host": socket.gethostname(), "pid": 1, "born": process_birth(1)}
ELSEWHERE = {"host": "another", "pid": 1, "born": 1.0}


def log_of(folder: Path, iteration: list[int]) -> EventLog:
    folder.mkdir(exist_ok=True)
    return EventLog(folder / "events.jsonl", lambda: iteration[0])


def test_columns_are_of_one_length() -> None:
    columns = Columns()
    assert columns.last() == {} and len(columns) == 0
    columns.add({"iteration": 1, "loss": 2.5, "kind": "step", "on": True})
    columns.add({"iteration": 2, "loss": None, "late": 10**400})
    columns.add({"iteration": 3})
    assert list(columns) == ["iteration", "loss", "late"] and len(columns) == 3
    np.testing.assert_array_equal(np.frombuffer(columns["loss"]), [2.5, math.nan, math.nan])
    np.testing.assert_array_equal(np.frombuffer(columns["late"]), [math.nan, math.inf, math.nan])
    assert columns.last() == {"iteration": 3.0}


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    at, run = [0], Run("a", tmp_path / "a")
    assert not run.poll() and run.status is Status.WAITING and run.share is None and run.eta_seconds is None
    log, sink = log_of(tmp_path / "a", at), JsonlSink(tmp_path / "a/metrics.jsonl", None)
    log.tell("start", train_iters=10, metrics_file=None, run="mine", **HERE)
    assert run.poll() and run.status is Status.RUNNING and run.share == 0.0
    log.tell("train")
    for at[0] in range(1, 5):
        sink.write("step", at[0], {"loss": 3.0 - at[0] / 10, "step_seconds": 2.0 if at[0] > 1 else 50.0})
    sink.write("evaluation", 4, {"loss": 2.7})
    log.tell("progress")
    assert run.poll() and not run.poll()
    assert [event["kind"] for event in run.events] == ["start", "train"] and run.new_events == []
    assert run.iteration == 4 and run.share == 0.4 and run.seconds_per_step == 2.0 and run.eta_seconds == 12.0
    assert run.summary()["step"]["loss"] == 2.6 and run.summary()["evaluation"] == {"iteration": 4, "loss": 2.7}
    log.tell("end", reason="--early-stopping-patience", complete=True)
    assert run.poll() and [event["kind"] for event in run.new_events] == ["end"]
    assert run.status is Status.COMPLETED and run.share == 1.0 and run.eta_seconds == 0.0
    fresh = Run("a", tmp_path / "a")
    fresh.poll()
    assert json.dumps(fresh.summary(), allow_nan=False) == json.dumps(run.summary(), allow_nan=False)
    assert fresh.marks == run.marks and len(fresh.marks) == 3


@pytest.mark.parametrize(
    ("process", "told", "status"),
    [
        (GONE, [], Status.LOST),
        (GONE, [("load", {"error": "hidden"})], Status.FAILED),
        (HERE, [("load", {"error": "hidden"})], Status.RUNNING),
        (GONE, [("end", {"reason": "SIGTERM", "complete": False})], Status.STOPPED),
        (HERE, [("end", {"reason": "ValueError: x", "complete": False, "error": "ValueError: x"})], Status.FAILED),
        (ELSEWHERE, [("train", {})], Status.RUNNING),
        ({"host": socket.gethostname(), "pid": 1, "born": -1.0}, [], Status.LOST),  # its number was given to another
    ],
)
def test_what_became_of_it(tmp_path: Path, process: dict[str, Any], told: list[Any], status: Status) -> None:
    log = log_of(tmp_path, [3])
    log.tell("start", train_iters=10, **process)
    for kind, fields in told:
        log.tell(kind, **fields)
    run = Run(".", tmp_path)
    run.poll()
    assert run.status is status
    assert run.reason == next((fields.get("reason", fields.get("error", "")) for _, fields in told), "")
    log.tell("start", train_iters=10, **HERE)  # it goes on
    assert run.poll() and run.status is Status.RUNNING and run.reason == ""


def test_a_run_on_another_machine_falls_silent(tmp_path: Path) -> None:
    log_of(tmp_path, [3]).tell("start", train_iters=10, **ELSEWHERE)
    now = [0.0]
    run = Run(".", tmp_path, lambda: now[0])
    run.poll()
    assert run.last_event_time is not None
    now[0] = run.last_event_time + 100
    assert not run.poll() and run.status is Status.RUNNING
    now[0] += 100
    assert run.poll() and run.status is Status.SILENT


def test_a_process_that_ends_is_seen_before_its_parent_asks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = {"host": socket.gethostname(), "pid": child.pid, "born": process_birth(child.pid)}
    assert start["born"] is not None and process_is_there(start) is True
    child.kill()
    while process_is_there(start):
        pass
    assert process_birth(child.pid) is None
    child.communicate()


def test_metrics_elsewhere_taken_back_and_of_two_runs(tmp_path: Path) -> None:
    log, other = log_of(tmp_path / "a", [1]), tmp_path / "other.jsonl"
    log.tell("start", train_iters=10, metrics_file=str(other), **GONE)
    sink = JsonlSink(other, None)
    for iteration in (1, 2, 3):
        sink.write("step", iteration, {"loss": 1.0})
    run = Run("a", tmp_path / "a")
    run.poll()
    assert run.metrics_path == other and run.iteration == 3 and list(run.steps["iteration"]) == [1, 2, 3]
    version = run.version
    sink.go_back(1)
    sink.write("step", 2, {"loss": 5.0})
    assert run.poll() and list(run.steps["loss"]) == [1.0, 5.0] and run.version == version + 1
    sink.write("evaluation", 2, {"loss": 4.0})
    sink.write("step", 1, {"loss": 7.0})  # a new run's rows follow
    sink.write("evaluation", 1, {"loss": 6.0})
    assert run.poll() and list(run.steps["loss"]) == [7.0] and list(run.evaluations["loss"]) == [6.0]
    with other.open("ab") as file:
        file.write(b'{"kind": "step"}\n{"kind": "nonsense", "iteration": 3}\n{"kind": "test", "iteration": 3}\n')
    with (tmp_path / "a/events.jsonl").open("ab") as file:
        file.write(b'{"time": NaN, "kind": "end", "iteration": 1, "uptime": 1}\n{"time": 1.0')
    assert run.poll() and run.unreadable == 3 and run.status is Status.LOST
