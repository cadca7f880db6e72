"""Source 002's group on parallel training: how many models run at once, and what becomes of those that fail."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from megaforge.fleet.model import Model, State
from megaforge.fleet.recipe import read_fleet
from megaforge.fleet.report import REPORT_FILE, Report
from megaforge.fleet.supervisor import Supervisor
from megaforge.monitor.events import read_events
from megaforge.monitor.sinks import JsonlSink
from tests.end_to_end.launch import REPO
from tests.fleet.fakes import Starter, manager, supervise, write_fleet


@pytest.mark.parametrize(
    ("text", "machine", "at_once"),
    [
        ("", manager(), 1),
        ("mode: parallel\n", manager(), 3),
        ("mode: parallel\nworkers: 2\n", manager(), 2),
        ("mode: parallel\n", manager(2), 1),
        ("mode: parallel\ncpus_per_worker: 1\n", manager(2), 2),
        ("mode: parallel\n", manager(memory=16), 2),
    ],
)
def test_so_many_run_at_once_as_there_is_room_for(tmp_path: Path, text: str, machine: object, at_once: int) -> None:
    starter = Starter(memory=8)
    fleet = write_fleet(tmp_path, text)
    status, supervisor = supervise(fleet, starter, machine)  # type: ignore[arg-type]
    assert status == 0 and max(starter.most) == at_once
    assert [name for name, _ in starter.started] == ["a", "b", "c"]
    told = read_events(tmp_path / "out/fleet.jsonl").events
    assert told[0]["workers"] == at_once and told[-1]["kind"] == "fleet_end" and told[-1]["completed"] == 3
    assert [model["directory"] for model in told[0]["models"]] == ["a", "b", "c"]
    assert told[0]["models"][0]["train_iters"] == 4


def test_what_the_first_model_needs_replaces_the_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 GB each: one fits in 12; it is seen to need 1, and then the two others run at once."""
    starter = Starter(memory=1)
    status, supervisor = supervise(write_fleet(tmp_path, "mode: parallel\n"), starter, manager(memory=12))
    assert status == 0 and starter.most == [1, 1, 2]
    assert supervisor.manager.limits.memory_per_worker_gb == pytest.approx(1.1)
    said = capsys.readouterr().err
    assert "Memory warning: 3 workers need 24GB, but only 12GB available" in said
    assert "models at once from now on: 3" in said
    kinds = [event["kind"] for event in read_events(tmp_path / "out/fleet.jsonl").events]
    assert kinds.index("measured") < kinds.index("workers")


@pytest.mark.parametrize(("status", "says"), [(-9, ""), (1, "Signal 9 (SIGKILL) received by PID 7\n"), (137, "")])
def test_after_an_out_of_memory_kill_fewer_run_at_once(tmp_path: Path, status: int, says: str) -> None:
    starter = Starter(a=[status], says=says)
    ended, supervisor = supervise(write_fleet(tmp_path, "mode: parallel\n", "abcd"), starter)
    assert ended == 0 and starter.counts() == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert starter.most[:3] == [1, 2, 3] and supervisor._most == 2
    assert starter.started[3][0] == "a"  # before those that wait
    told = read_events(tmp_path / "out/fleet.jsonl").events
    assert [(event["model"], event["attempt"]) for event in told if event["kind"] == "model_retry"] == [("a", 2)]


def test_a_failure_is_tried_once_more_and_the_others_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter = Starter(a=[1, 1], b=[2], says="hello\nerror: --lr nan: no\n")
    status, supervisor = supervise(write_fleet(tmp_path), starter)
    assert status == 1 and starter.counts() == {"a": 2, "b": 1, "c": 1}
    states = {model.name: (model.state, model.reason) for model in supervisor.models}
    assert states["a"] == (State.FAILED, "status 1: error: --lr nan: no") and states["c"][0] is State.COMPLETED
    assert states["b"] == (State.FAILED, "status 2: error: --lr nan: no")  # the same line would say the same
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert [row["state"] for row in report["models"]] == ["failed", "failed", "completed"]
    assert "error: --lr nan" in capsys.readouterr().out
    again = Starter()
    assert supervise(write_fleet(tmp_path), again)[0] == 0  # the same command goes on


def test_one_is_stopped_by_a_file_and_all_by_a_signal(tmp_path: Path) -> None:
    fleet, starter = write_fleet(tmp_path, "mode: parallel\nworkers: 2\n"), Starter(polls=10**9)
    supervisor = Supervisor(fleet, manager(), starter)
    looks, tick = [0], supervisor._tick

    def look() -> None:
        tick()
        looks[0] += 1
        if looks[0] == 1:
            (tmp_path / "out/a/stop").touch()
        if looks[0] == 5:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # passed on by a launcher: the same request twice

    supervisor._tick = look  # type: ignore[method-assign]
    assert supervisor.run() == 3
    assert [model.state for model in supervisor.models] == [State.STOPPED, State.STOPPED, State.STOPPED]
    assert not (tmp_path / "out/a/stop").exists() and not any(job.killed for job in starter.jobs)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    (tmp_path / "out/b/stop").touch()
    status, again = supervise(fleet, Starter())
    assert status == 3 and [model.state for model in again.models] == ["completed", "stopped", "completed"]


def test_a_sweep_is_a_model_for_each_combination_and_a_table(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "flags: {mock_data: true, vocab_size: 64, train_iters: 4}\n"
        "models: [{name: m, flags: {lr: 1}}]\nsweep: {lr: [1e-3, 3e-3], weight-decay: [0, 0.1], bf16: [true, false]}\n"
    )
    fleet = read_fleet(str(path))
    assert len(fleet.models) == 8 and fleet.models[0].name == "m_lr-1e-3_weight-decay-0_bf16-true"
    words = fleet.models[5].words
    assert words[words.index("--lr") + 1] == "3e-3" and words.count("--lr") == 1
    assert "--mock-data" in words and "--no-bf16" in words and "--bf16" in fleet.models[4].words
    models = [Model(one, tmp_path / "out") for one in fleet.models[:3]]
    for model, loss in zip(models, (3.0, 2.0, None), strict=True):
        if loss is not None:
            JsonlSink(model.directory / "metrics.jsonl", None).write("evaluation", 4, {"loss": loss})
        model.directory.mkdir(parents=True, exist_ok=True)
        model.run.poll()
    report = Report(fleet.settings, models, 1.0, 1)
    assert [row["valid_loss"] for row in report.rows()] == [2.0, 3.0, None]
    head, first, *_ = report.table().splitlines()
    assert head.split()[:4] == ["model", "--lr", "--weight-decay", "--bf16"] and first.split()[1:4] == [
        "1e-3",
        "0",
        "false",
    ]


def test_the_examples_are_fleets_that_can_be() -> None:
    for name, models in (("fleet", 3), ("sweep", 6)):
        fleet = read_fleet(str(REPO / f"examples/fleet/{name}.yaml"))
        assert len({Model(one, Path("x")).check().config.name for one in fleet.models}) == 1
        assert len(fleet.models) == models


def test_threads_are_divided_and_stay_as_a_fleet_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(13)))
    starter = Starter()
    supervise(write_fleet(tmp_path, "mode: parallel\n"), starter)
    assert {threads for _, threads in starter.started} == {4}
    again = Starter()
    supervise(write_fleet(tmp_path), again)  # in series now: other threads would sum in another order
    assert {threads for _, threads in again.started} == {4}
    given = Starter()
    supervise(write_fleet(tmp_path, "threads: 2\n"), given)
    assert {threads for _, threads in given.started} == {2}
