"""What a run leaves behind for whoever starts it again."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaforge import pretrain as module
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.config.launcher import Launch
from megaforge.config.resilience_config import ResilienceConfig
from megaforge.errors import UserError
from megaforge.resilience.leaving import COMPLETED, UNFINISHED, check_requeue_status, mark, nothing_left, unmark
from megaforge.resilience.requests import Requests


def config_of(save: Path, *more: str) -> Config:
    flags = ("--config", "cdrmix-test", "--mock-data", "--save", str(save), "--load", str(save))
    return parse_config([*flags, *more], prog="test").config


def publish(save: Path, step: int) -> None:
    (save / f"step_{step:07d}").mkdir(parents=True)
    (save / f"step_{step:07d}" / "manifest.json").write_text(json.dumps({"meta": {"iteration": step}}))


def test_a_completed_run_is_not_started_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert nothing_left(config) is None
    publish(tmp_path, 5)
    mark(config, 5, "--train-iters is reached", complete=True)
    said = nothing_left(config)
    assert said is not None and "iteration 5 (--train-iters is reached); nothing is left to do" in said
    assert nothing_left(config_of(tmp_path, "--tp", "2", "--log-interval", "7")) == said, "the same run elsewhere"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    unmark(config)
    assert nothing_left(config) is None


@pytest.mark.parametrize("more", [("--train-iters", "9"), ("--skip-train", "--eval-iters", "1"), ("--lr", "0.5")])
def test_a_line_that_asks_for_more_is(tmp_path: Path, more: tuple[str, ...]) -> None:
    publish(tmp_path, 5)
    mark(config_of(tmp_path), 5, "done", complete=True)
    assert nothing_left(config_of(tmp_path, *more)) is None


def test_a_mark_without_its_checkpoint_says_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    publish(tmp_path, 4)
    mark(config, 5, "done", complete=True)
    assert nothing_left(config) is None
    for text in ("", "[]", "{}", '{"iteration": 4'):
        (tmp_path / COMPLETED).write_text(text)
        assert nothing_left(config) is None
    other = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, load=None))
    publish(tmp_path, 5)
    mark(other, 5, "done", complete=True)
    assert nothing_left(other) is None, "a run that does not continue itself"


def test_torchrun_is_given_no_requeue_status(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--requeue-exit-code", "85")
    for launcher in ("python", "srun", "OpenMPI"):
        check_requeue_status(config, Launch(launcher, 0, 2, 0))
    check_requeue_status(config_of(tmp_path), Launch("torchrun", 0, 2, 0))
    assert ResilienceConfig().requeue_exit_code == 0, "as Megatron-LM's runs leave"
    with pytest.raises(UserError, match="--requeue-exit-code 85: torchrun takes it for a failure"):
        check_requeue_status(config, Launch("torchrun", 0, 2, 0))


def test_the_status_says_whether_something_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry with a trainer that is asked to end, then completes, then is not started any more."""
    line = ["pretrain_cdrmix.py", "--config", "cdrmix-test", "--mock-data", "--requeue-exit-code", "85"]
    monkeypatch.setattr(sys, "argv", [*line, "--save", str(tmp_path), "--load", str(tmp_path)])
    trainer = SimpleNamespace(complete=False, iteration=5, stop_reason="SIGUSR1")
    trainer.train, trainer.add = (lambda requests: None), (lambda callback: None)
    started = []
    monkeypatch.setattr("megaforge.training.prepare.prepare", lambda config, *rest: SimpleNamespace(config=config))
    monkeypatch.setattr("megaforge.training.setup.initialize_distributed", lambda config: None)
    monkeypatch.setattr("megaforge.training.watching.watched", lambda config, ctx: nullcontext())
    monkeypatch.setattr("megaforge.training.setup.build_trainer", lambda *given: started.append(1) or trainer)
    monkeypatch.setattr(Requests, "listen", lambda self, announce: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / COMPLETED).write_text("{}")
    assert module.pretrain("test", "") == 85 and not (tmp_path / COMPLETED).exists()
    assert "SIGUSR1" in (tmp_path / UNFINISHED).read_text()
    publish(tmp_path, 5)
    trainer.complete, trainer.stop_reason = True, None
    assert module.pretrain("test", "") == 0 and not (tmp_path / UNFINISHED).exists()
    assert module.pretrain("test", "") == 0 and len(started) == 2
