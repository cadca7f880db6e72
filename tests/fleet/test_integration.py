"""Source 002's group on the whole: small models really trained, killed, gone on with, and the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaforge.fleet import CognateCreator, TrainingConfig
from megaforge.fleet.report import REPORT_FILE
from megaforge.monitor.events import read_events
from megaforge.monitor.runs import process_is_there
from tests.end_to_end.launch import LIMIT, REPO, environment
from tests.held import held, until

ROOM = {"threads": 1, "memory_per_worker_gb": 0.1, "cpus_per_worker": 0.1, "min_free_memory_gb": 0, "high_load": 1}
CONFIG = TrainingConfig(model_size=5000, batch_size=1, epochs=4, checkpoint_interval=1, sequence_length=8, fleet=ROOM)
FIRST, SECOND = "planner_1", "planner_2"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """(directory, models, progress while they were trained) of three models, one after the other."""
    folder, creator, seen = tmp_path_factory.mktemp("series"), CognateCreator(CONFIG), list[dict[str, Any]]()
    done = threading.Event()

    def watch() -> None:
        while True:
            seen.append(creator.get_training_progress())
            if done.wait(0.5):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        models = creator.create_three_models(folder)
    finally:
        done.set()
        watcher.join()
    return folder, models, [*seen, creator.get_training_progress()]


def test_three_models_are_trained_in_series(series: tuple[Path, list[str], Any]) -> None:
    folder, models, _ = series
    assert models == [str(folder / f"planner_{number}") for number in (1, 2, 3)]
    losses = set()
    for model in models:
        told = json.loads(Path(f"{model}.json").read_text())
        assert told["final_model"] is True and told["config"]["model_type"] == "planner"
        assert told["config"]["epochs"] == 4 and told["iteration"] == 40 and told["attempts"] == 1
        assert (Path(model) / told["checkpoint"] / "SHA256SUMS").is_file()
        assert told["peak_memory_bytes"] > 1e7
        losses.add(told["loss"])
    assert len(losses) == 3  # three seeds


def test_progress_is_seen_from_another_thread(series: tuple[Path, list[str], list[dict[str, Any]]]) -> None:
    *seen, last = series[2]
    shares = [one["overall_progress"] for one in seen]
    assert seen[0]["mode"] == "series" and shares == sorted(shares) and shares[-1] > 0
    assert last["overall_progress"] == 100 and last["completed_models"] == 3


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


def weights(model: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, by file."""
    return {file.name: file.read_bytes() for file in sorted((model / "step_0000040").glob("*.safetensors"))}


def starts(model: Path) -> list[dict[str, Any]]:
    """What a model's processes told as they began."""
    path = model / "events.jsonl"
    return [one for one in read_events(path).events if one["kind"] == "start"] if path.exists() else []


def test_killed_in_parallel_they_become_the_same_bytes(series: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    """SIGKILL of one model, then of the supervisor; the same command goes on, and nothing is lost."""
    content = yaml.safe_load((series[0] / "fleet.yaml").read_text())
    content["models"] = [one for one in content["models"] if one["name"] in (FIRST, SECOND)]
    path, out = tmp_path / "fleet.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(content))
    line = [sys.executable, str(REPO / "tools/train_fleet.py"), "--config", str(path), "--output", str(out)]
    line += ["--mode", "parallel", "--workers", "2"]
    go_on, saved = tmp_path / "go_on", str(out / FIRST / "step_00000[12]0")  # in its first attempt, and its second
    variables = held(tmp_path / "held", saved, 1, go_on, base=environment())
    process = subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def told(kind: str, **fields: Any) -> list[dict[str, Any]]:
        events = read_events(out / "fleet.jsonl").events if (out / "fleet.jsonl").exists() else []
        return [one for one in events if one["kind"] == kind and fields.items() <= one.items()]

    try:
        wait_until((out / FIRST / "step_0000010").exists, process)
        os.kill(told("model_start", model=FIRST)[0]["pid"], signal.SIGKILL)
        wait_until(lambda: bool(told("model_start", model=FIRST, attempt=2)), process)
    finally:
        process.kill()
        process.communicate()
        go_on.touch()
    until(lambda: not any(process_is_there(start) for name in (FIRST, SECOND) for start in starts(out / name)))
    assert told("model_end", model=FIRST)[0]["reason"].startswith("signal 9")
    shown = subprocess.run([*line[:2], "show", str(out)], env=environment(), capture_output=True, text=True)
    assert FIRST in shown.stdout and SECOND in shown.stdout and shown.returncode == 0
    again = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    for name in (FIRST, SECOND):
        assert weights(out / name) == weights(series[0] / name) != {}
        assert not any(process_is_there(start) for start in starts(out / name))
    assert len({one["pid"] for one in told("model_start", model=FIRST)}) == 3


def test_the_report_names_every_model(series: tuple[Path, list[str], Any]) -> None:
    folder, models, _ = series
    report = json.loads((folder / REPORT_FILE).read_text())
    assert [row["directory"] for row in report["models"]] == models and report["mode"] == "series"
    assert report["threads"] == 1 and report["seconds"] > 0
    shown = subprocess.run(
        [sys.executable, str(REPO / "tools/train_fleet.py"), "show", str(folder)], capture_output=True, text=True
    )
    assert shown.stdout.startswith("3 of 3 models complete: Overall 100.0%")
