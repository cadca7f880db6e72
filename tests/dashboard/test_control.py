"""Starting and stopping fleets from a page, short of training: tests/dashboard/test_browser.py trains one."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megaforge.dashboard import control as control_module
from megaforge.dashboard.app import control_routes
from megaforge.dashboard.control import Control
from megaforge.dashboard.feed import Feed
from megaforge.errors import UserError
from megaforge.fleet.machine import GB, Machine
from megaforge.fleet.resources import ResourceManager
from megaforge.monitor.events import process_birth
from megaforge.monitor.runs_folder import Runs
from tests.dashboard.serving import HEADER, Served, a_run, served

FLAGS = "flags: {config: cdrmix-test, mock_data: true, vocab_size: 64, device: cpu, train_iters: 4}\n"
MODELS = "models: [{name: a}, {name: b}]\n"


def a_fleet(path: Path, text: str = FLAGS + MODELS) -> Path:
    path.write_text(text)
    return path


def control_of(tmp_path: Path, text: str = FLAGS + MODELS) -> Control:
    runs = tmp_path / "runs"
    runs.mkdir(exist_ok=True)
    feed = Feed(Runs(runs), lambda: None, control=True, seconds=1.0)
    feed.poll()
    return Control([a_fleet(tmp_path / "three.yaml", text)], runs, feed)


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 CPUs with 20 GB free."""
    real, machine = ResourceManager.__init__, Machine(4, 32 * GB, 20 * GB, 0.1)
    monkeypatch.setattr(ResourceManager, "__init__", lambda self, limits=None: real(self, limits, lambda: machine))


def test_what_is_offered(tmp_path: Path) -> None:
    offers = control_of(tmp_path, "mode: parallel\nworkers: 9\n" + FLAGS + MODELS).offers()
    (fleet,) = offers["fleets"]
    assert (fleet["name"], fleet["models"], fleet["mode"], fleet["workers"]) == ("three", ["a", "b"], "parallel", 6)
    assert offers["modes"] == ["series", "parallel"] and offers["most_workers"] == 6
    assert offers["suggestion"] == {"training_mode_suggestion": "parallel", "max_workers": 2}


def test_a_number_of_workers_is_judged_as_the_fleet_would(tmp_path: Path) -> None:
    control = control_of(tmp_path)
    assert control.check("three", "series", 6) == {
        "workers": 1,
        "reason": "one model after the other",
        "warning": False,
    }
    found = control.check("three", "parallel", 2)
    assert (found["workers"], found["warning"]) == (2, False) and "2 workers fit" in found["reason"]
    found = control.check("three", "parallel", 6)
    assert (found["workers"], found["warning"]) == (2, True)
    assert "6 workers need 48GB, but only 20GB available" in found["reason"]
    roomy = control_of(
        tmp_path, "memory_per_worker_gb: 0.5\ncpus_per_worker: 0.5\nmin_free_memory_gb: 0\n" + FLAGS + MODELS
    )
    assert roomy.check("three", "parallel", 6)["workers"] == 6


@pytest.mark.parametrize(
    "fleet, mode, workers, word",
    [
        ("none", "series", 1, "fleet 'none': there is none of this name; --control names three"),
        ("../three", "series", 1, "there is none of this name"),
        ("three", "serial", 1, "mode 'serial': expected series or parallel"),
        ("three", "parallel", 0, "workers 0: must be from 1 to 6"),
        ("three", "parallel", 7, "workers 7: must be from 1 to 6"),
    ],
)
def test_choices_that_are_none(tmp_path: Path, fleet: str, mode: str, workers: int, word: str) -> None:
    control = control_of(tmp_path)
    for act in (control.check, control.start):
        with pytest.raises(UserError, match=word):
            act(fleet, mode, workers)


def test_files_that_are_not_fleets(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    feed = Feed(Runs(tmp_path), lambda: None, control=True, seconds=1.0)
    one, other = a_fleet(tmp_path / "f.yaml"), a_fleet(tmp_path / "x" / "f.yaml")
    with pytest.raises(UserError, match="--control .*x/f.yaml: .*f.yaml has the same name; rename one"):
        Control([one, other], tmp_path, feed)
    with pytest.raises(UserError, match="none.yaml: cannot read it"):
        Control([tmp_path / "none.yaml"], tmp_path, feed)
    with pytest.raises(UserError, match="models is missing"):
        Control([a_fleet(tmp_path / "g.yaml", FLAGS)], tmp_path, feed)


def test_a_fleet_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "_SECONDS_TO_START", 300.0)
    control = control_of(tmp_path, FLAGS + "models: [{name: a, flags: {lr: nan}}]\n")
    with pytest.raises(UserError, match=r"fleet three ended with status 2: error: .*--lr nan"):
        control.start("three", "series", 1)


def fleet_of_this_process(folder: Path, pid: int) -> None:
    a_run(folder / "a")
    models = [{"name": "a", "train_iters": 8, "directory": "a"}]
    born = process_birth("self") if pid == os.getpid() else 1.0
    start = {"host": socket.gethostname(), "pid": pid, "born": born, "mode": "series", "workers": 1, "models": models}
    line = {"time": 1.0, "kind": "fleet_start", "iteration": 0, "uptime": 1.0, "reason": "series", **start}
    (folder / "fleet.jsonl").write_text(json.dumps(line) + "\n")


def test_only_what_runs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    fleet_of_this_process(tmp_path / "runs/three", os.getpid())
    fleet_of_this_process(tmp_path / "runs/gone", 2**22 + 1)
    control = control_of(tmp_path)
    for name in ("gone", "none"):
        with pytest.raises(UserError, match=f"fleet {name}: it is not running on this machine"):
            control.stop(name)
    for run in ("gone/a", "none", "../runs/three/a"):
        with pytest.raises(UserError, match="it is not a model of a fleet that runs"):
            control.stop_model(run)
    assert killed == []
    with pytest.raises(UserError, match="fleet three: it runs already"):
        control.start("three", "series", 1)
    assert control.stop("three") == {"fleet": "three"} and killed == [(os.getpid(), 15)]
    assert control.stop_model("three/a") == {"run": "three/a"}
    assert (tmp_path / "runs/three/a/stop").exists() and not (tmp_path / "runs/gone/a/stop").exists()


def post(board: Served, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", board.port, timeout=300)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_requests(tmp_path: Path) -> None:
    runs, as_json = tmp_path / "runs", {**HEADER, "Content-Type": "application/json"}
    fleet_of_this_process(runs / "three", os.getpid())

    def routes(feed: Feed) -> Any:
        return control_routes(Control([a_fleet(tmp_path / "three.yaml")], runs, feed))

    with served(runs, control=True, more=routes) as board:
        state = board.json("/api/state")
        fleet = state["fleets"]["three"]
        assert state["control"] and fleet["alive"] and fleet["runs"] == ["three/a"] and fleet["workers"] == 1
        assert board.json("/api/control")["fleets"][0]["name"] == "three"
        assert board.json("/api/control/check?fleet=three&mode=parallel&workers=6")["warning"]
        for query, word in (("mode=series", "workers ''"), ("workers=9e9", "workers '9e9'"), ("workers=1", "fleet")):
            assert word in board.json(f"/api/control/check?{query}", 400)["error"]
        for path in ("start", "stop", "stop_model"):
            assert board.get(f"/api/control/{path}")[0] == 404  # only what is posted acts
            assert post(board, f"/api/control/{path}", b"{}", {"Content-Type": "application/json"})[0] == 401
            assert post(board, f"/api/control/{path}", b"{}", {**as_json, "Origin": "http://evil.example"})[0] == 403
            assert post(board, f"/api/control/{path}", b'{"fleet": "three"}', HEADER)[0] == 400  # a form's type
            for body in (b"{", b"[]", b"", b'{"fleet": 1, "run": 2}'):
                assert post(board, f"/api/control/{path}", body, as_json)[0] == 400, (path, body)
        status, body = post(board, "/api/control/stop_model", b'{"run": "three/a"}', as_json)
        assert (status, body) == (200, b'{"run":"three/a"}')
    with served(runs) as board:  # without --control
        assert not board.json("/api/state")["control"] and board.get("/api/control")[0] == 404
        assert post(board, "/api/control/stop_model", b'{"run": "three/a"}', as_json)[0] in (404, 405)
