"""What a run tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.checkpoint.manifest import SUMS_FILE, sums_digest
from megaforge.errors import UserError
from megaforge.monitor.events import read_events
from megaforge.monitor.provenance import code_version, environment
from megaforge.monitor.runs import process_is_there
from megaforge.planning.goodput_command import of_run
from megaforge.resilience.requests import Requests
from tests.training.tiny import arguments, make_trainer, record, write_dataset


def test_a_run_and_its_continuation_tell_their_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = (
        *("--save", str(save), "--load", str(save), "--save-interval", "2"),
        *("--eval-iters", "1", "--eval-interval", "2"),
        *("--keep-last", "1", "--save-replica", str(tmp_path / "copies"), "--train-iters", "4"),
    )
    first = make_trainer(arguments(prefix, *flags, "--exit-interval", "2"))
    rows = record(first)
    first.train()
    assert 0 < [row for row in rows.records if row["kind"] == "step"][-1].get("loss", 0)
    make_trainer(arguments(prefix, *flags, "--async-save")).train()
    events, torn = read_events(save / "events.jsonl")
    assert torn is None
    kinds = [event["kind"] for event in events]
    assert kinds == [
        *("start", "load", "train", "stop", "evaluate", "replica", "save", "end", "goodput"),
        *("start", "load", "train", "evaluate", "retain", "replica", "save", "end", "goodput"),
    ]
    start, anew, *_ = events
    assert start["layout"]["world"] == 1 and start["train_iters"] == 4 and start["hosts"] == {start["host"]: 1}
    assert process_is_there(start) and start["metrics_file"] is None
    assert start.items() >= code_version().items() and "torch" in environment()["packages"]
    assert anew["path"] is None
    loaded = next(event for event in events[9:] if event["kind"] == "load")
    assert loaded["path"] == "step_0000002" and loaded["step"] == 2 and loaded["seconds"] > 0
    saved = [event for event in events if event["kind"] == "save"]
    assert loaded["sums"] == saved[0]["sums"] != saved[1]["sums"] == sums_digest(save / "step_0000004")
    assert next(event for event in events if event["kind"] == "retain")["removed"] == ["step_0000002"]
    ends = [event for event in events if event["kind"] == "end"]
    assert [(end["iteration"], end["complete"]) for end in ends] == [(2, False), (4, True)]
    assert ends[0]["reason"] == "--exit-interval 2"
    goodput = events[-1]
    assert set(goodput["spent"]) >= {"steps", "start-up", "save", "evaluation", "load"}
    assert "goodput" in capsys.readouterr().err
    assert "start-up" in of_run(str(save))


def test_what_went_wrong_is_told(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = arguments(prefix, "--save", str(save), "--load", str(save), "--save-interval", "2", "--train-iters", "4")
    make_trainer(flags).train()
    with (save / "step_0000004" / SUMS_FILE).open("ab") as file:
        file.write(b"x")
    (save / "step_0000004" / "manifest.json").write_bytes(b"{}")
    trainer = make_trainer([*flags, "--async-save"])

    def fail(*_: object) -> None:
        raise UserError("no more")

    trainer.engine.clip = fail  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no more"):
        trainer.train()
    told = read_events(save / "events.jsonl").events
    rejected = next(event for event in told if event["kind"] == "rejected")
    assert rejected["path"] == "step_0000004" and rejected["renamed"] == "step_0000004.damaged"
    end, _, alert = told[-3:]
    assert end["kind"] == "end" and end["reason"] == end["error"] == "UserError: no more" and not end["complete"]
    assert (alert["kind"], alert["alert"], alert["state"]) == ("alert", "failure", "firing")
    with pytest.raises(UserError):
        make_trainer([*flags, "--hidden-size", "64"])
    assert read_events(save / "events.jsonl").events[-1]["kind"] == "load"
    assert "hidden" in read_events(save / "events.jsonl").events[-1]["error"]


def test_background_saves_tell_how_long_steps_waited(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = ("--save", str(save), "--save-interval", "2", "--train-iters", "4", "--async-save")
    trainer = make_trainer(arguments(prefix, *flags))
    rows = record(trainer)
    trainer.train(Requests())
    assert rows.records
    told = [event for event in read_events(save / "events.jsonl").events if event["kind"].startswith("save")]
    assert [event["kind"] for event in told] == ["save_begin", "save", "save"]
    assert all(event["seconds"] >= 0 for event in told)
