"""SIGKILL of a dashboard's server and of a watcher while runs write: started again, nothing is lost or told twice."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaforge.dashboard.access import TOKEN_VARIABLE
from megaforge.dashboard.serve import listen
from megaforge.monitor.events import process_birth, read_events
from megaforge.monitor.runs_folder import Runs
from megaforge.monitor.watcher import ALERTS_FILE
from tests.dashboard.serving import HEADER, TOKEN, a_run, told, until
from tests.end_to_end.launch import command, environment

KILLS, NAMES, MANY = 3, ("a", "b", "c"), 5000


class Writers:
    """A thread in which runs write their steps, each line in two pieces, as a reader may find it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.steps = directory, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write)
        for name in NAMES:
            a_run(directory / name, steps=0, train_iters=1_000_000)

    def _write(self) -> None:
        files = [(self.directory / name / "metrics.jsonl").open("a") for name in NAMES]
        while not self._ended.is_set():
            step = self.steps + 1
            lines = [f'{{"kind": "step", "iteration": {step}, "loss": {step * number}}}\n' for number in (1, 2, 3)]
            for piece in (slice(0, 20), slice(20, None)):
                for file, line in zip(files, lines, strict=True):
                    file.write(line[piece])
                    file.flush()
                time.sleep(0.01 if step < MANY else 0.5)  # so that a curve of 10,000 points holds all
            if step % 50 == 0:
                for name in NAMES:
                    told(self.directory / name, "progress", step, time=float(step))
            self.steps = step
        for file in files:
            file.close()

    def __enter__(self) -> Writers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def ask(port: int, path: str) -> Any:
    """What the server answers; None while there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path, headers=HEADER)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    assert answer.status == 200, content
    return json.loads(content)


@contextlib.contextmanager
def killed_at_the_end(told: Path, *line: str) -> Iterator[None]:
    """A program that runs for the time of the block; ``told``: what it prints is appended there."""
    with told.open("a") as file:
        process = subprocess.Popen(command(1, *line), env={**environment(), TOKEN_VARIABLE: TOKEN}, stdout=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Page:
    """Follows the state by polling; what it was told of each run is never less than before."""

    def __init__(self, port: int) -> None:
        self.port, self.sequence, self.epoch = port, 0, ""
        self.rows: dict[str, dict[str, Any]] = {}

    def ask(self) -> bool:
        """Whether the server answered."""
        message = ask(self.port, f"/api/state?since={self.sequence}&epoch={self.epoch}")
        if message is None:
            return False
        assert message["full"] == (message["epoch"] != self.epoch)
        assert message["full"] or message["since"] <= self.sequence < message["sequence"] or not message["runs"]
        rows = {row["name"]: row for row in message["runs"]}
        for name in rows.keys() & self.rows.keys():
            assert rows[name]["points"] >= self.rows[name]["points"], (name, rows[name], self.rows[name])
        self.rows = rows if message["full"] else self.rows | rows
        for name in message["removed"]:
            del self.rows[name]
        self.sequence, self.epoch = message["sequence"], message["epoch"]
        return True


def test_the_server_is_killed_while_runs_write(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as free:
        port = int(free.getsockname()[1])
    line = ("tools/dashboard.py", "--runs", str(tmp_path), "--port", str(port), "--interval", "0.05")
    out = tmp_path / "out"
    a_run(tmp_path / "goes")
    page, epochs = Page(port), set[str]()
    with contextlib.ExitStack() as last:
        with Writers(tmp_path) as writers:
            for kill in range(KILLS):
                with killed_at_the_end(out, *line):
                    until(page.ask)
                    epochs.add(page.epoch)
                    assert page.rows.keys() == {*NAMES, "goes"} - ({"goes"} if kill else set())
                    seen = page.rows["a"]["points"]
                    until(lambda seen=seen: page.ask() and page.rows["a"]["points"] > seen + 20)
                if not kill:
                    shutil.rmtree(tmp_path / "goes")  # while nobody looks
            until(lambda: writers.steps > page.rows["a"]["points"])  # some that no server has seen
            last.enter_context(killed_at_the_end(out, *line))
            until(lambda: page.ask() and page.rows["a"]["points"] > seen + 40)
        steps = writers.steps
        told(tmp_path / "a", "alert", 9, 9.0, alert="nan", state="firing", severity="critical", text="the loss is nan")
        until(lambda: page.ask() and {row["points"] for row in page.rows.values()} == {steps})
        until(lambda: page.ask() and page.rows["a"]["alerts"])
        found = ask(port, "/api/series?run=a&run=b&run=c&metric=loss&points=10000")
        state, history = ask(port, "/api/state"), ask(port, "/api/history")
    assert len(epochs) == KILLS and page.rows.keys() == set(NAMES)
    for number, curve in enumerate(found["curves"], 1):
        assert steps == curve["count"] < 10_000 and curve["x"] == list(range(1, steps + 1))
        assert curve["y"] == [number * step for step in curve["x"]]
    assert [alert["alert"] for alert in state["alerts"]] == ["nan"]
    fresh = Runs(tmp_path)
    while fresh.poll().behind:
        pass
    assert list(map(tuple, zip(history["time"], history["share"], strict=True))) == fresh.history()
    assert all(run.unreadable == 0 for run in fresh.runs.values())


def test_a_watcher_is_killed_while_runs_write(tmp_path: Path) -> None:
    """Runs fail and go on again before its end and while it is not there; each is told once, by its line and in
    ``alerts.jsonl``."""
    runs, out, here = tmp_path / "runs", tmp_path / "out", {"host": socket.gethostname(), "pid": os.getpid()}
    here["born"] = process_birth("self")
    line = ("tools/watch_runs.py", "--runs", str(runs), "--interval", "0.05", "--alerts-off", "disk")
    out.touch()

    def fails(name: str) -> None:
        told(runs / name, "end", 1, time=time.time(), reason="OSError: full", error="OSError: full", complete=False)

    def goes_on(name: str) -> None:
        told(runs / name, "start", 1, time=time.time(), train_iters=8, run=name, **here)

    rounds = [(f"before_{kill}", f"after_{kill}") for kill in range(KILLS)]
    for name in (name for both in rounds for name in both):
        goes_on(name)
    with Writers(runs):
        for before, after in rounds:
            with killed_at_the_end(out, *line):
                fails(before)
                until(lambda before=before: states(runs / before) == ["firing"])
            goes_on(before)
            fails(after)
        with killed_at_the_end(out, *line):
            until(lambda: all(states(runs / after) == ["firing"] for _, after in rounds))
            until(lambda: all(states(runs / before) == ["firing", "resolved"] for before, _ in rounds))
    said = re.findall(r"run (\w+) on \S+ (ALERT|resolved:) failure", out.read_text())
    assert len(said) == len(set(said)) == len(out.read_text().splitlines()) == 3 * KILLS


def states(folder: Path) -> list[str]:
    """Of the one alert that a watcher kept beside a run, in their order."""
    path = folder / ALERTS_FILE
    events = read_events(path).events if path.exists() else []
    assert {event["alert"] for event in events} <= {"failure"}
    return [event["state"] for event in events]
