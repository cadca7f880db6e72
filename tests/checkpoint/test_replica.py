"""Copies of checkpoints elsewhere: whole or none, as many as there are here, and their way back."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.directory import list_steps
from megaforge.checkpoint.manifest import MANIFEST_FILE
from megaforge.checkpoint.replica import Replica, copy_and_retain
from megaforge.checkpoint.shards import TensorEntry
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.test_background import contents
from tests.training.tiny import arguments, make_trainer, write_dataset
from tools.convert_checkpoint import main

CTX = ParallelContext.single()
FILE = "rank_00000.safetensors"


def _save(directory: Path, step: int) -> Path:
    return save_checkpoint(directory, step, [TensorEntry("x", None, torch.full((9,), float(step)))], {}, CTX)


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replica = Replica(f"memory://{tmp_path.name}")
    assert replica.steps() == []
    with pytest.raises(UserError, match="no copy of step N there; it has none"):
        replica.fetch(tmp_path / "back")
    replica.check()
    paths = [_save(tmp_path / "run", step) for step in (1, 2)]
    for path in paths:
        assert replica.copy(path, CTX) is None
    assert replica.steps() == [2, 1]
    line = ["convert_checkpoint.py", "fetch", replica.url, str(tmp_path / "back")]
    for more in ((), ("--step", "1")):
        monkeypatch.setattr(sys, "argv", [*line, *more])
        assert main() == 0
    assert "step_0000002: fetched" in capsys.readouterr().out
    here, back = contents(tmp_path / "run"), contents(tmp_path / "back")
    assert back == {name: content for name, content in here.items() if name != "latest"}
    with pytest.raises(UserError, match="step 1 is there already"):
        main()
    with pytest.raises(UserError, match=r"no copy of step 7 there; it has \[2, 1\]"):
        replica.fetch(tmp_path / "back", 7)


def test_a_half_or_damaged_copy_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="megaforge")
    replica, elsewhere = Replica(str(tmp_path / "copies")), tmp_path / "copies"
    first, second = (_save(tmp_path / "run", step) for step in (1, 2))
    copy_and_retain(replica, first, [], CTX)
    (elsewhere / second.name).write_text("in the way")
    copy_and_retain(replica, second, [first], CTX)
    assert replica.steps() == [1], "none goes for one that did not come"
    assert "no copy of step_0000002: " in caplog.text
    (elsewhere / second.name).unlink()
    copy_and_retain(replica, second, [first], CTX)
    assert replica.steps() == [2] and [path.name for path in elsewhere.iterdir()] == [second.name]
    (elsewhere / second.name / FILE).write_bytes(bytes(100))
    with pytest.raises(UserError, match=f"the copy of step 2 is damaged: {FILE} has 100 bytes instead of"):
        replica.fetch(tmp_path / "back")
    assert not list((tmp_path / "back").iterdir()), "what is not whole is not left there"
    (elsewhere / second.name / MANIFEST_FILE).unlink()
    assert replica.steps() == []


def test_runs_copy_what_they_keep(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d")
    for name, more in (("plain", ()), ("background", ("--async-save",))):
        save, url = tmp_path / name, f"memory://{tmp_path.name}-{name}"
        line = ("--save", str(save), "--save-interval", "1", "--train-iters", "4", "--keep-last", "2")
        make_trainer(arguments(prefix, *line, "--save-replica", url, *more)).train()
        assert Replica(url).steps() == [step for step, _ in list_steps(save)] == [4, 3]
    blocked = tmp_path / "file"
    blocked.write_text("")
    for url, said in ((f"{blocked}/x", "nothing can be written there"), ("nosuch://x", "nosuch")):
        with pytest.raises(UserError, match=f"^--save-replica {url}: .*{said}"):
            make_trainer(arguments(prefix, "--save", str(tmp_path / "new"), "--save-replica", url))
