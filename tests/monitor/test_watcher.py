"""A watcher raises what a dead or stuck process cannot say of itself, and resolves it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaforge.config.alert_config import AlertConfig
from megaforge.monitor import disks, watch_rules
from megaforge.monitor.alerts import Alert
from megaforge.monitor.audit import AUDIT_FILE, AuditTrail
from megaforge.monitor.events import EventLog, process_birth, read_events
from megaforge.monitor.watcher import ALERTS_FILE, FOLDER, FOLDER_FILE, Watcher
from tests.end_to_end.launch import REPO

# A run that tells its start and one minute, and then works on.
RUN = """
import os, socket, sys, time
from megaforge.monitor.events import EventLog, process_birth
log = EventLog(sys.argv[1], lambda: 7)
log.tell("start", run="r", host=socket.gethostname(), pid=os.getpid(), born=process_birth("self"), train_iters=9)
log.tell("progress")
print("up", flush=True)
time.sleep(600)
"""
NO_DISK = ("disk", "memory")


class Ear:
    """A channel that remembers."""

    def __init__(self) -> None:
        self.heard: list[Alert] = []

    def tell(self, alert: Alert) -> None:
        self.heard.append(alert)

    def close(self, seconds: float) -> None:
        """Nothing is left."""

    def brief(self) -> list[tuple[str, str, str]]:
        found = [(alert.run, alert.alert, alert.state) for alert in self.heard]
        self.heard.clear()
        return found


def watch(directory: Path, now: Callable[[], float] = time.time, **flags: Any) -> tuple[Watcher, Ear]:
    ear = Ear()
    config = AlertConfig(alerts_off=flags.pop("off", NO_DISK), alert_repeat_minutes=flags.pop("repeat", 0.5))
    return Watcher(directory, config, [ear], heartbeat_minutes=10.0, since_hours=24.0, now=now), ear


def begin(directory: Path, iteration: int = 3, **fields: Any) -> EventLog:
    """The events of a run of this process, begun."""
    directory.mkdir(parents=True, exist_ok=True)
    log = EventLog(directory / "events.jsonl", lambda: iteration)
    whose = {"host": socket.gethostname(), "pid": os.getpid(), "born": process_birth("self"), **fields}
    log.tell("start", run="r", train_iters=9, **whose)
    return log


def test_a_killed_run_has_failed_until_it_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    words = [sys.executable, "-c", RUN, str(run / "events.jsonl")]
    process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    watcher, ear = watch(tmp_path / "runs")
    watcher.look()
    assert ear.brief() == [] and watcher.firing == {}
    process.send_signal(signal.SIGKILL)
    process.wait()
    watcher.look()
    watcher.look()
    text = f"its process (pid {process.pid} on {socket.gethostname()}) is gone without a word, after iteration 7"
    assert watcher.firing == {"one": {"failure": text}}
    assert ear.brief() == [("one", "failure", "firing")]
    again, second_ear = watch(tmp_path / "runs")
    again.look()
    assert second_ear.brief() == [] and again.firing == watcher.firing, "a watcher that is started again has told it"
    begin(run).tell("train")
    again.look()
    assert second_ear.brief() == [("one", "failure", "resolved")] and again.firing == {}
    told = read_events(run / ALERTS_FILE).events
    assert [(event["alert"], event["state"], event["iteration"]) for event in told] == [
        ("failure", "firing", 7),
        ("failure", "resolved", 3),
    ]


def test_a_run_that_said_why_it_failed(tmp_path: Path) -> None:
    log = begin(tmp_path / "one")
    log.tell("alert", alert="failure", state="firing", text="its own words")
    log.tell("end", reason="UserError: no", error="UserError: no", complete=False)
    watcher, ear = watch(tmp_path)
    watcher.look()
    [alert] = ear.heard
    assert alert.text == "the run ended at iteration 3 by UserError: no" and alert.severity == "critical"
    log.tell("start", run="r", host="elsewhere", pid=1, born=1.0)
    log.tell("end", reason="--train-iters is reached", complete=True)
    ear.heard.clear()
    watcher.look()
    assert ear.brief() == [("one", "failure", "resolved")]


def test_a_run_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs here, and one on a machine that nobody sees from here; metrics are signs of life too."""
    logs = {"here": begin(tmp_path / "here"), "there": begin(tmp_path / "there", host="elsewhere")}
    clock = [time.time()]
    monkeypatch.setattr(watch_rules, "time", SimpleNamespace(time=lambda: clock[0]))
    (tmp_path / "here" / "metrics.jsonl").touch()
    for path in tmp_path.glob("*/*.jsonl"):  # by this clock they were written just now
        os.utime(path, (clock[0], clock[0]))
    watcher, ear = watch(tmp_path, lambda: clock[0])
    clock[0] += 599
    watcher.look()
    assert ear.brief() == []
    os.utime(tmp_path / "here" / "metrics.jsonl", (clock[0], clock[0]))
    clock[0] += 2
    watcher.look()
    [alert] = ear.heard
    assert (alert.run, alert.alert, alert.value, alert.limit) == ("there", "no_heartbeat", 10.02, 10.0)
    assert "its machine is another one" in alert.text
    clock[0] += 600
    watcher.look()
    assert ear.brief()[1:] == [("here", "no_heartbeat", "firing")]
    for log in logs.values():
        log.tell("progress")
    for name in logs:
        os.utime(tmp_path / name / "events.jsonl", (clock[0], clock[0]))
    watcher.look()
    assert ear.brief() == [("here", "no_heartbeat", "resolved"), ("there", "no_heartbeat", "resolved")]


def test_what_runs_tell_is_passed_on(tmp_path: Path) -> None:
    log = begin(tmp_path / "one")
    for state in ("firing", "resolved", "firing"):
        log.tell("alert", alert="nan", state=state, text=f"nan {state}")
    log.tell("alert", alert="of another program", state="firing", text="unknown")
    log.tell("alert", alert="throughput", state="resolved", text="fast")
    watcher, ear = watch(tmp_path, off=(*NO_DISK, "loss_spike"))
    watcher.look()
    assert ear.brief() == [("one", "nan", "firing")], "what was over before is not told"
    for name, state in (
        ("nan", "resolved"),
        ("throughput", "firing"),
        ("throughput", "resolved"),
        ("loss_spike", "firing"),
    ):
        log.tell("alert", alert=name, state=state, text=state)
    watcher.look()
    assert ear.brief() == [
        ("one", "nan", "resolved"),
        ("one", "throughput", "firing"),
        ("one", "throughput", "resolved"),
    ]
    log.tell("alert", alert="memory", state="firing", text="off here")
    log.tell("alert", alert="expert_collapse", state="firing", text="two of four")
    watcher.look()
    assert watcher.firing == {"one": {"expert_collapse": "two of four"}}
    log.tell("end", reason="SIGTERM", complete=False)
    watcher.look()
    assert watcher.firing == {}, "a run that was asked to end has no alerts"


def test_a_broken_audit_trail_and_a_report_that_does_not_pass(tmp_path: Path) -> None:
    begin(tmp_path / "one")
    path, report = tmp_path / "one" / AUDIT_FILE, tmp_path / "one" / "compliance.json"
    trail = AuditTrail(path)
    for number in range(4):
        trail.append("save", step=number)
    watcher, ear = watch(tmp_path)
    watcher.look()
    assert ear.brief() == []
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    spoiled = {
        "edited": whole.replace(b'"step":2', b'"step":7'),
        "deleted": b"".join(lines[:2] + lines[3:]),
        "reordered": b"".join([*lines[:2], lines[3], lines[2]]),
        "truncated": b"".join(lines[:-1]),
    }
    for how, content in spoiled.items():
        assert content != whole
        path.write_bytes(content)
        watcher.look()
        assert "the audit trail is broken" in watcher.firing["one"]["compliance"], how
        path.write_bytes(whole)
        watcher.look()
        assert watcher.firing == {}, how
    path.unlink()
    watcher.look()
    assert watcher.firing["one"]["compliance"] == "audit.jsonl is gone"
    path.write_bytes(whole)
    asked = {"level": "enhanced", "score": 0.95}
    report.write_text(json.dumps({"passed": False, "score": 0.9, "asked": asked, "lacking": ["rule 5: 0.8"]}))
    watcher.look()
    words = "compliance.json: the score is 0.9000 (asked: enhanced, 0.95); lacking: rule 5: 0.8"
    assert watcher.firing == {"one": {"compliance": words}}
    report.write_text("[]")
    watcher.look()
    assert "cannot be read as a compliance report" in watcher.firing["one"]["compliance"]
    report.write_text(json.dumps({"passed": True, "score": 0.96, "asked": asked, "lacking": []}))
    watcher.look()
    assert watcher.firing == {} and ear.brief()[-1] == ("one", "compliance", "resolved")


def test_the_folders_disk_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        begin(tmp_path / name)
    monkeypatch.setattr(disks, "_share", lambda path: 0.97)
    watcher, ear = watch(tmp_path, off=())
    watcher.look()
    [alert] = ear.heard
    assert alert.alert == "disk" and "97.0% full (limit 90%)" in alert.text
    monkeypatch.setattr(disks, "_share", lambda path: 0.5)
    again, ear = watch(tmp_path, off=())
    again.look()
    assert ear.brief() == [(FOLDER, "disk", "resolved")]
    assert [event["state"] for event in read_events(tmp_path / FOLDER_FILE).events] == ["firing", "resolved"]


def test_runs_that_go_that_are_old_and_that_cannot_be_watched(tmp_path: Path) -> None:
    old, gone = begin(tmp_path / "old", host="elsewhere"), begin(tmp_path / "gone")
    old.tell("progress")
    gone.tell("alert", alert="nan", state="firing", text="nan")
    begin(tmp_path / "odd")
    (tmp_path / "odd" / ALERTS_FILE).write_text("a shopping list\n")
    later = time.time() + 25 * 3600
    watcher, ear = watch(tmp_path, lambda: later)
    watcher.look()
    assert watcher.passed_over == ["old"] and "is not a file of events" in watcher.problems["odd"]
    assert (tmp_path / "odd" / ALERTS_FILE).read_text() == "a shopping list\n"
    assert ("gone", "nan", "firing") in ear.brief()
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    watcher._runs._scanned = None  # it looks for folders every two seconds
    watcher.look()
    assert ("gone", "nan", "resolved") in ear.brief() and not (tmp_path / "gone").exists()


def test_the_tool(tmp_path: Path) -> None:
    log = begin(tmp_path / "runs" / "one")
    log.tell("end", reason="UserError: no", error="UserError: no", complete=False)
    out = tmp_path / "told"
    words = [
        sys.executable,
        str(REPO / "tools/watch_runs.py"),
        "--runs",
        str(tmp_path / "runs"),
        "--alerts-off",
        "disk",
    ]
    command = f"{sys.executable} -c \"open('{out}', 'a').write(input() + chr(10))\""
    once = subprocess.run([*words, "--once", "--alert-command", command], capture_output=True, text=True)
    assert once.returncode == 1 and once.stdout == "one: failure: the run ended at iteration 3 by UserError: no\n"
    assert "1 runs are watched" in once.stderr
    assert json.loads(out.read_text())["run"] == "one"
    going = subprocess.Popen([*words, "--interval", "0.1"], stdout=subprocess.PIPE, text=True)
    log.tell("start", run="r", host="elsewhere", pid=1, born=1.0)
    assert going.stdout is not None and "resolved: failure" in going.stdout.readline()
    going.send_signal(signal.SIGTERM)
    assert going.wait(300) == 0
