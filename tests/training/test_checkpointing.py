"""What parts of a run keep in checkpoints: numbers, tensors that all ranks hold alike, tensors cut like weights."""

from __future__ import annotations

import dataclasses
import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint import storage
from megaforge.checkpoint.checkpoint import read_meta
from megaforge.checkpoint.directory import list_steps
from megaforge.checkpoint.stateful import Stateful
from megaforge.errors import UserError
from megaforge.parallel.flat_shard import Entry, optimizer_shard
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback, Place
from megaforge.training.checkpointing import load_run, stateful_parts
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_trainer, weights, write_dataset


class WeightMeans(Callback):
    """Running means of the loss and of every weight that this rank holds."""

    place = Place.RECORD
    state_name = "means"

    def __init__(self, trainer: Trainer) -> None:
        self.steps = 0
        self.loss = torch.zeros(1, dtype=torch.float64)
        self.declared = {spec.name: optimizer_shard(parameter) for spec, parameter in named_specs(trainer.model)}
        self.means = {name: torch.zeros_like(tensor) for name, _, tensor in trainer.optimizer.weight_entries()}
        trainer.add(self)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.steps += 1
        self.loss.lerp_(torch.tensor([metrics.loss], dtype=torch.float64), 1 / self.steps)
        for name, _, tensor in trainer.optimizer.weight_entries():
            self.means[name].lerp_(tensor, 1 / self.steps)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert not self.loss.any(), "numbers come before tensors"
        self.steps = state["steps"]

    def tensors(self) -> list[Entry]:
        weights = [(f"weights.{name}", self.declared[name], mean) for name, mean in self.means.items()]
        return [("loss", None, self.loss), *weights]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


def run(line: list[str]) -> WeightMeans:
    """Trains as ``line`` says, with means that go on from its ``--load``."""
    trainer = make_trainer(line)
    means = WeightMeans(trainer)
    if trainer.config.checkpoint.load is not None:
        load_run(trainer)
    trainer.train()
    return means


def test_a_callback_goes_on_with_its_tensors(prefix: str, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    whole = run(arguments(prefix))
    run(arguments(prefix, "--save", save, "--train-iters", "3"))
    resumed = run(arguments(prefix, "--load", save))
    assert (resumed.steps, len(resumed.means)) == (6, len(whole.means)) and whole.loss.item() > 0
    assert torch.equal(resumed.loss, whole.loss)
    assert all(torch.equal(mean, whole.means[name]) for name, mean in resumed.means.items())


def test_a_part_that_only_the_checkpoint_knows_is_said(
    prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save = str(tmp_path / "run")
    run(arguments(prefix, "--save", save, "--train-iters", "1"))
    trainer = make_trainer(arguments(prefix, "--load", save))
    said = "what it keeps as callbacks.means is not part of this run"
    assert trainer.iteration == 1 and capfd.readouterr().err.count(said) == 1
    late = WeightMeans(trainer)
    late.state_name = "other"  # one that the checkpoint does not know starts afresh
    load_run(trainer)
    assert late.steps == 0


def test_names_are_taken_once_and_lead_the_keys(prefix: str, tmp_path: Path) -> None:
    trainer = make_trainer(arguments(prefix, "--save", str(tmp_path / "run")))
    part = Stateful(lambda: {"count": 3}, lambda state: None, lambda: [("elsewhere.x", None, torch.ones(1))])
    trainer.stateful["counts"] = part
    with pytest.raises(ValueError, match=r"'elsewhere.x' of 'counts' must be named counts.SOMETHING"):
        trainer.save()
    trainer.stateful["counts"] = dataclasses.replace(part, tensors=tuple)
    trainer.save()
    [(_, path)] = list_steps(tmp_path / "run")
    assert read_meta(path)["state"]["counts"] == {"count": 3}
    trainer.stateful["optimizer"] = part
    with pytest.raises(ValueError, match="2 parts of the run want to be kept in checkpoints as 'optimizer'"):
        stateful_parts(trainer)


def test_a_run_starts_where_its_checkpoint_may_be_missing(
    prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From other weights while there is nothing of its own, then from its own; from nothing where that is allowed."""
    other, save, missing = (str(tmp_path / name) for name in ("other", "run", "missing"))
    first = run_tiny(arguments(prefix, "--save", other, "--train-iters", "1"))
    line = arguments(prefix, "--pretrained-checkpoint", other, "--train-iters", "2")
    for more in ((), ("--load", missing), ("--load", missing, "--finetune")):
        trainer = make_trainer([*line, *more])
        assert trainer.iteration == 0 and all(map(torch.equal, weights(trainer).values(), weights(first).values()))
    line += ["--save", save, "--load", save]
    run_tiny(line)
    assert make_trainer(line).iteration == 2, "its own checkpoint goes before"
    with pytest.raises(UserError, match=f"^--pretrained-checkpoint {missing}: does not exist"):
        make_trainer(arguments(prefix, "--pretrained-checkpoint", missing))

    capfd.readouterr()
    lenient = arguments(prefix, "--no-exit-on-missing-checkpoint", "--load", missing)
    assert make_trainer(lenient).iteration == 0
    assert f"--load {missing}: nothing was saved there yet, so the run starts anew" in capfd.readouterr().err
    for more in (("--finetune",), ("--ckpt-step", "4"), ("--exit-on-missing-checkpoint",)):
        with pytest.raises(UserError, match="does not exist"):
            make_trainer([*lenient, *more])
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(UserError, match="--from megatron .*missing --save NEW"):
        make_trainer(lenient)


def run_tiny(line: list[str]) -> Trainer:
    trainer = make_trainer(line)
    trainer.train()
    return trainer


class _Watch(Callback):
    """Holds a save back until the second step after it begins, and notes what the run hears of saves."""

    def __init__(self, hold: threading.Event) -> None:
        self.hold = hold
        self.heard: list[tuple[int, int, str]] = []

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.background is not None and trainer.iteration == 3:
            assert trainer.background.writing, "steps go on while it is written"
            self.hold.set()

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self.heard.append((trainer.iteration, trainer.saved_iteration, path.name))


def test_saving_in_the_background_saves_the_same(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step the same bytes as without, also of averages and ZeRO's masters; the run hears of it once it is
    published, and ends with its last one."""
    hold, write = threading.Event(), storage.write_safetensors
    line = arguments(prefix, "--ema-decay", "0.9", "--save-interval", "2", "--keep-last", "0")
    plain = run_tiny([*line, "--save", str(tmp_path / "plain")])
    trainer = make_trainer([*line, "--save", str(tmp_path / "background"), "--async-save"])
    trainer.add(watch := _Watch(hold))
    monkeypatch.setattr(storage, "write_safetensors", lambda *given, **how: (hold.wait(300), write(*given, **how))[1])
    trainer.train()
    names = [f"step_{step:07d}" for step in (2, 4, 6)]
    assert [(saved, name) for _, saved, name in watch.heard] == [*zip((2, 4, 6), names, strict=True)]
    assert watch.heard[0][0] in (4, 5) and watch.heard[-1] == (6, 6, names[-1])
    for name in names:
        pair = [(tmp_path / run / name / "rank_00000.safetensors").read_bytes() for run in ("plain", "background")]
        assert pair[0] == pair[1]
    assert all(map(torch.equal, weights(trainer).values(), weights(plain).values()))
    again = [*line, "--train-iters", "7", "--async-save", "--save", str(tmp_path / "plain"), "--load"]
    assert weights(run_tiny([*again, str(tmp_path / "plain")])).keys() == weights(plain).keys()


def test_what_the_writer_could_not_do_ends_the_run(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **how: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make_trainer(arguments(prefix, "--save", str(tmp_path), "--save-interval", "2", "--async-save"))
    monkeypatch.setattr(storage, "write_safetensors", full)
    with pytest.raises(UserError, match="the checkpoint of step 2 was not written, .* No space left"):
        trainer.train()
    assert trainer.iteration in (3, 4), "at the latest where the next one is due"


def test_an_exception_waits_for_what_is_being_written(prefix: str, tmp_path: Path) -> None:
    class Fault(Callback):
        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.iteration == 2:
                raise ZeroDivisionError

    trainer = make_trainer(arguments(prefix, "--save", str(tmp_path), "--save-interval", "2", "--async-save"))
    trainer.add(Fault())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert [step for step, _ in list_steps(tmp_path)] == [2]
