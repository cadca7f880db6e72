"""Many runs below a folder: found, followed and dropped; their progress together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaforge.monitor import runs_folder
from megaforge.monitor.events import EventLog
from megaforge.monitor.runs_folder import Overall, Runs
from tests.monitor.test_runs import GONE, HERE


@pytest.fixture(autouse=True)
def _scans_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_folder, "_RESCAN_SECONDS", 0.0)


def told(folder: Path, *events: tuple[float, str, int, dict[str, Any]], name: str = "events.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        for time, kind, iteration, fields in events:
            file.write(
                json.dumps({"time": time, "kind": kind, "iteration": iteration, "uptime": time, **fields}) + "\n"
            )
    return folder


START = {"train_iters": 100, **HERE}


def test_runs_come_and_go(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs.poll() == ([], [], [], False) and runs.sequence == 0
    told(tmp_path, (1.0, "start", 0, START))
    told(tmp_path / "deep/er/run", (1.0, "start", 0, START))
    told(tmp_path / "a/b/c/too_deep", (1.0, "start", 0, START))
    told(tmp_path / ".hidden", (1.0, "start", 0, START))
    told(tmp_path / "deep/step_4", (1.0, "start", 0, START))
    (tmp_path / "loop").symlink_to(tmp_path)
    found = runs.poll()
    assert found.added == [".", "deep/er/run"] == sorted(found.changed) and runs.sequence == 1
    assert runs.poll() == ([], [], [], False) and runs.sequence == 1
    shutil.rmtree(tmp_path / "deep")
    assert runs.poll().removed == ["deep/er/run"] and list(runs.runs) == ["."]
    shutil.rmtree(tmp_path)
    assert runs.poll().removed == ["."] and not runs.runs


def test_a_poll_reads_so_much_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_folder, "_BUDGET", 500)
    for number in range(6):
        told(tmp_path / f"r{number}", *((float(i), "progress", i, {}) for i in range(20)))
    runs, polls = Runs(tmp_path), 1
    while runs.poll().behind:
        polls += 1
        assert polls < 100
    assert polls > 3
    assert all(len(run.marks) == 20 for run in runs.runs.values())


def test_progress_together(tmp_path: Path) -> None:
    told(tmp_path / "a", (0.0, "start", 0, START), (10.0, "train", 0, {}), (20.0, "progress", 50, {}))
    told(tmp_path / "b", (0.0, "start", 0, START), (10.0, "train", 0, {}), (30.0, "progress", 25, {}))
    runs = Runs(tmp_path)
    runs.poll()
    names = ["a", "b", "c"]
    # a: 50 steps of 0.2 s; b: 75 of 0.8 s; c: the mean of 20 and 80 s; two at a time
    assert runs.overall(names) == Overall(3, 0, 2, 0, 0, 0.25, pytest.approx((10 + 60 + 50) / 2))
    assert runs.overall(["a", "b"]).line() == "Training 2 models in parallel: Overall 37.5%"
    assert runs.overall(["a", "b"]).eta_seconds == pytest.approx(60)  # the longest
    history = [(10.0, 0.0), (10.0, 0.0), (20.0, 0.25), (30.0, 0.375)]
    assert runs.history() == history
    assert runs.history(points=2) == [history[1], history[3]]
    told(tmp_path / "a", (40.0, "end", 60, {"complete": True}))
    told(tmp_path / "b", (40.0, "start", 0, {"train_iters": 100, **GONE}))
    runs.poll()
    overall = runs.overall()
    assert (overall.completed, overall.running, overall.failed, overall.eta_seconds) == (1, 0, 1, 0.0)
    assert overall.line() == "1 of 2 models complete: Overall 62.5%"
    assert Runs(tmp_path / "none").overall() == Overall(0, 0, 0, 0, 0, 0.0, 0.0)
    fresh = Runs(tmp_path)
    fresh.poll()
    assert fresh.overall() == overall and fresh.history() == runs.history()


def test_what_was_asked_to_end_has_not_failed(tmp_path: Path) -> None:
    ends = {"asked": {"complete": False}, "failed": {"complete": False, "error": "OSError: full"}}
    for name, fields in ends.items():
        told(tmp_path / name, (1.0, "start", 0, START), (2.0, "end", 50, {"reason": "why", **fields}))
    told(tmp_path / "lost", (1.0, "start", 0, {**START, **GONE}))
    told(tmp_path / "silent", (1.0, "start", 0, {**START, "host": "elsewhere"}))
    runs = Runs(tmp_path)
    runs.poll()
    overall = runs.overall()
    assert (overall.completed, overall.running, overall.stopped, overall.failed) == (0, 0, 1, 3)


def test_a_fleet_names_models_that_have_not_begun(tmp_path: Path) -> None:
    models = [{"name": "a", "train_iters": 100}, {"name": "b", "train_iters": None}, "damage"]
    log = EventLog(told(tmp_path / "fleet", name="none") / "fleet.jsonl")
    log.tell("fleet_start", models=models, **HERE)
    told(tmp_path / "fleet/a", (0.0, "start", 0, START), (10.0, "progress", 50, {}))
    runs = Runs(tmp_path)
    assert runs.poll().added == ["fleet", "fleet/a"]
    fleet = runs.fleets["fleet"]
    assert fleet.runs() == ["fleet/a", "fleet/b"] and fleet.models == {"a": 100, "b": None} and fleet.running
    assert runs.overall(fleet.runs()).share == 0.25
    log.tell("fleet_end")
    assert runs.poll().changed == ["fleet"] and not fleet.running
    assert Runs(tmp_path / "fleet").poll().added == [".", "a"]
