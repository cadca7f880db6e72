"""A run that goes on from a snapshot in memory, after a process or a node is lost, learns as if none had been."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaforge.checkpoint.encryption import KEY_VARIABLE
from megaforge.errors import UserError
from megaforge.monitor.events import read_events
from megaforge.resilience import snapshots
from megaforge.training.callbacks import Callback
from megaforge.training.snapshots import snapshot_folder
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of, whole
from tests.training.tiny import dense_arguments, make_trainer, weights, write_dataset

STEPS = ("--train-iters", "7", "--save-interval", "4", "--snapshot-interval", "1", "--ema-decay", "0.9")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class Fault(Callback):
    """Ends the process, as far as the run can see, before step ``at``; snapshots that were begun are whole."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.iteration + 1 == self.at:
            raise ZeroDivisionError


class Settled(Callback):
    """No snapshot is left out because the one before is slow."""

    def on_step_start(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:
            if (thread := getattr(getattr(callback, "_background", None), "_thread", None)) is not None:
                thread.join()


class Watch(Callback):
    """What is in ``folder`` before each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[list[str]]()

    def on_step_start(self, trainer: Trainer) -> None:
        self.seen.append(names(self.folder))


def ended_at(trainer: Trainer, step: int) -> Trainer:
    trainer.add(Settled())
    trainer.add(Fault(step))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return trainer


def to_end(trainer: Trainer) -> Trainer:
    trainer.add(Settled())
    trainer.train()
    return trainer


def line(prefix: str, save: Path, memory: Path, *more: str) -> list[str]:
    where = ("--save", str(save), "--load", str(save), "--snapshot-dir", str(memory))
    return dense_arguments(prefix, "*-", *STEPS, *where, *more)


def same(found: Trainer, expected: Trainer) -> bool:
    states = [{key: t for key, _, t in trainer.optimizer.state_entries()} for trainer in (found, expected)]
    pairs = [*zip(weights(found).values(), weights(expected).values(), strict=True)]
    return all(torch.equal(a, b) for a, b in [*pairs, *((states[0][key], states[1][key]) for key in states[1])])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("step"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = to_end(make_trainer(line(prefix, folder / "run", folder / "memory", "--hidden-dropout", "0.1")))
    assert not snapshot_folder(str(folder / "memory"), str(folder / "run")).exists(), "the end is saved"
    return trainer


def test_the_newest_state_that_is_whole_is_gone_on_from(
    prefix: str, tmp_path: Path, undisturbed: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot before any checkpoint, newer than it, older than it, damaged; those of another run, and of a past that
    the run left, are none."""
    save, memory = tmp_path / "run", tmp_path / "memory"
    argv = line(prefix, save, memory, "--hidden-dropout", "0.1")
    folder = snapshot_folder(str(memory), str(save))
    ended_at(make_trainer(argv), 3)
    assert [path.name for path in folder.iterdir() if path.name != "latest"] == ["step_0000002"]
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.copytree(save, tmp_path / "early"), shutil.copytree(memory, tmp_path / "kept")
    trainer = make_trainer(argv)
    assert (trainer.iteration, trainer.saved_iteration) == (2, 0)
    ended_at(trainer, 7)
    assert sorted(os.listdir(folder)) == ["latest", "step_0000006"]
    shutil.copytree(save, tmp_path / "late")

    trainer = make_trainer(argv)
    assert (trainer.iteration, trainer.saved_iteration) == (6, 4)
    assert same(to_end(trainer), undisturbed) and not folder.exists()
    told = [event for event in read_events(save / "events.jsonl").events if event["kind"] == "snapshot"]
    assert [event["step"] for event in told] == [1, 2, 3, 5, 6] and all(e["stall"] < e["seconds"] for e in told)

    # Snapshots of step 2 beside a checkpoint of step 4.
    (
        shutil.rmtree(save),
        shutil.copytree(tmp_path / "late", save),
        shutil.copytree(tmp_path / "kept", memory, dirs_exist_ok=True),
    )
    trainer = make_trainer(argv)
    assert trainer.iteration == 4 and list(folder.iterdir()) == [], "it is of the past"
    # ... which is damaged.
    shutil.copytree(tmp_path / "kept", memory, dirs_exist_ok=True)
    flip(save / "step_0000004" / "rank_00000.safetensors")
    assert make_trainer(argv).iteration == 2
    # Both are damaged.
    flip(folder / "step_0000002" / "rank_00000.safetensors")
    shutil.rmtree(save), shutil.copytree(tmp_path / "early", save)
    assert make_trainer(argv).iteration == 0 and "rank_00000.safetensors" in caplog.text
    # A run that takes none in between, or another run that saves at the same place: they are of neither.
    plain = dense_arguments(
        prefix, "*-", "--train-iters", "7", "--ema-decay", "0.9", "--save", str(save), "--load", str(save)
    )
    for before in (lambda: make_trainer(plain), lambda: shutil.rmtree(save)):
        shutil.rmtree(save), shutil.copytree(tmp_path / "early", save)
        shutil.copytree(tmp_path / "kept", memory, dirs_exist_ok=True)
        before()
        assert (folder / "step_0000002").is_dir() and make_trainer(argv).iteration == 0


def test_what_cannot_be_made_is_left_out_and_told(
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, memory = tmp_path / "run", tmp_path / "memory"
    argv = line(prefix, save, memory, "--train-iters", "4", "--save-interval", "0")
    room = iter([10**9, 10**9, 0, 0])
    monkeypatch.setattr(snapshots, "free_bytes", lambda folder: next(room))
    trainer = make_trainer(argv)
    trainer.add(Settled())
    folder = snapshot_folder(str(memory), str(save))
    trainer.add(watch := Watch(folder))
    trainer.train()
    assert watch.seen == [[], ["step_0000001"], ["step_0000001"], ["step_0000001"]], "the one before stays"
    told = [event for event in read_events(save / "events.jsonl").events if event["kind"] == "snapshot"]
    assert [(event["step"], "left_out" in event) for event in told] == [(1, False), (2, True), (3, True)]
    assert "may be taken there" in told[1]["left_out"]
    assert caplog.text.count("a snapshot is left out") == 1
    shutil.rmtree(save)
    monkeypatch.setattr(snapshots, "free_bytes", lambda folder: 10**5)
    with pytest.raises(UserError, match="--snapshot-interval: snapshots need .* --shm-size"):
        make_trainer([*argv, "--snapshot-peers"]).train()
    assert "all ranks are on one machine" in capsys.readouterr().err
    memory.chmod(0o777)
    with pytest.raises(UserError, match="--snapshot-dir .*others may write there"):
        snapshots.own_folder(memory)


def _state(trainer: Trainer) -> dict[str, Any]:
    return {name: whole(s, t.detach(), trainer.ctx) for name, s, t in trainer.optimizer.weight_entries()}


def _two_nodes(prefix: str, folder: Path) -> list[str]:
    """Runs at two ranks that are two nodes with a memory each; returns what is wrong, of this rank."""
    os.environ[KEY_VARIABLE] = "5a" * 32
    save, memory = folder / "run", folder / "memory"
    more = ("--zero", "1", "--encrypt-checkpoints", "--snapshot-peers", "--snapshot-ranks-per-node", "1")
    argv = line(prefix, save, memory, "--save-interval", "0", "--train-iters", "4", *more)
    nodes = [snapshot_folder(str(memory), str(save)) / f"node_{number}" for number in (0, 1)]
    first = to_end(trainer_of(argv))
    expected = _state(first)
    if first.ctx.is_first_rank:
        shutil.rmtree(save)
    dist.barrier()
    ended_at(trainer_of(argv), 4)
    dist.barrier()
    files = [sorted(path.name for path in (node / "step_0000003").glob("rank*")) for node in nodes]
    wrong = [] if files == [[f"rank_0000{rank}.safetensors.aes" for rank in range(2)]] * 2 else [f"files {files}"]
    dist.barrier()
    if first.ctx.is_first_rank:
        shutil.copytree(folder, f"{folder}_kept")

    def again(name: str, damage: Callable[[], Any], *layout: str) -> Trainer:
        if first.ctx.is_first_rank:
            shutil.rmtree(folder), shutil.copytree(f"{folder}_kept", folder)
            damage()
        dist.barrier()
        trainer = trainer_of([*argv, *layout])
        if trainer.iteration != 3 * (name != "both copies are bad"):
            wrong.append(f"{name}: goes on from {trainer.iteration}")
        return trainer

    found = _state(to_end(again("a node is lost", lambda: shutil.rmtree(nodes[1]))))
    wrong += [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
    bad = [node / "step_0000003" / "rank_00001.safetensors.aes" for node in nodes]
    found = _state(to_end(again("a byte is bad, at another layout", lambda: flip(bad[1]), "--tp", "2", "--zero", "0")))
    wrong += [key for key, tensor in found.items() if not torch.allclose(tensor, expected[key], atol=1e-4)]
    again("both copies are bad", lambda: [*map(flip, bad)])
    return wrong


def test_one_of_two_nodes_is_lost_with_its_memory(
    ranks: RankPool, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.run(2, _two_nodes, prefix, tmp_path / "a") == [[]] * 2
    # Nobody takes its place: the other one goes on by itself.
    save, memory = tmp_path / "a" / "run", tmp_path / "a" / "memory"
    shutil.rmtree(tmp_path / "a"), shutil.copytree(tmp_path / "a_kept", tmp_path / "a")
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)
    [one, other] = sorted(snapshot_folder(str(memory), str(save)).iterdir())
    shutil.rmtree(one), other.rename(one)
    argv = line(prefix, save, memory, "--train-iters", "4", "--encrypt-checkpoints", "--snapshot-ranks-per-node", "1")
    assert make_trainer(argv).iteration == 3
