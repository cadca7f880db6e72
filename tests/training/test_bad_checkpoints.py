"""What a checkpoint directory may hold that is not this run's: one clear error each, and nothing is loaded in part."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.manifest import MANIFEST_FILE, SUMS_FILE
from megaforge.errors import UserError
from megaforge.training.checkpointing import load_run
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, dense_arguments, make_config, make_trainer, weights, write_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: ``run/save`` with the steps 1 and 2, and ``run/data.*``."""
    home = tmp_path_factory.mktemp("bad")
    prefix = write_dataset(home / "data")
    save = ("--save", str(home / "save"), "--save-interval", "1")
    make_trainer(dense_arguments(prefix, "*-", *save, "--train-iters", "2")).train()
    return home


def _edited(step: Path, change: Callable[[dict], None]) -> None:
    """A manifest that somebody has changed, and has made the sums agree."""
    manifest = json.loads((step / MANIFEST_FILE).read_text())
    before = hashlib.sha256((step / MANIFEST_FILE).read_bytes()).hexdigest()
    change(manifest)
    (step / MANIFEST_FILE).write_text(json.dumps(manifest))
    after = hashlib.sha256((step / MANIFEST_FILE).read_bytes()).hexdigest()
    (step / SUMS_FILE).write_text((step / SUMS_FILE).read_text().replace(before, after))


def _weight(manifest: dict) -> dict:
    return manifest["tensors"][next(key for key in sorted(manifest["tensors"]) if not key.startswith(("opt", "rank_")))]


def _without_a_tensor(manifest: dict) -> None:
    del manifest["tensors"][next(key for key in sorted(manifest["tensors"]) if not key.startswith(("opt", "rank_")))]


def _half_a_tensor(manifest: dict) -> None:
    _weight(manifest)["chunks"][0]["sizes"][0] -= 1


def _another_type(manifest: dict) -> None:
    _weight(manifest)["dtype"] = "F64"


def _another_program(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("2")


def _foreign_steps(folder: Path) -> None:
    for step in ("step_0000001", "step_0000002"):
        shutil.rmtree(folder / step)
    (folder / "step_0000007").mkdir()
    (folder / "step_0000007" / "notes.txt").write_text("mine")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor that is not there": (lambda f: _edited(f / "step_0000002", _without_a_tensor), "lacks 1 tensors"),
    "a tensor with a hole": (lambda f: _edited(f / "step_0000002", _half_a_tensor), "elements are in no piece|says"),
    "a tensor of another type": (lambda f: _edited(f / "step_0000002", _another_type), "float64|F64"),
    "another version": (lambda f: _edited(f / "step_0000002", lambda m: m.update(version=99)), "version 99"),
    "another program's pointer beside ours": (_another_program, "two programs have left checkpoints there"),
    "directories of somebody else": (_foreign_steps, "none of its checkpoints is valid: step_0000007 .*missing"),
}


def _trainer(run: Path, *more: str) -> Trainer:
    return make_trainer(dense_arguments(str(run / "data"), "*-", "--train-iters", "4", *more))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_and_nothing_is_loaded(run: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "save"
    shutil.copytree(run / "save", folder)
    spoil, text = BAD[name]
    spoil(folder)
    if name == "another version":
        shutil.rmtree(folder / "step_0000001")  # the one before would do
    trainer = _trainer(run)
    before = weights(trainer)
    flags = dataclasses.replace(trainer.config.checkpoint, load=str(folder))
    trainer.config = dataclasses.replace(trainer.config, checkpoint=flags)
    with pytest.raises(UserError, match=text):
        load_run(trainer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(trainer).items()), "loaded in part"


def test_another_model_and_files_that_nobody_asked_for(run: Path, tmp_path: Path) -> None:
    prefix = str(run / "data")
    with pytest.raises(UserError, match="another model.*--hidden-size 32 in the checkpoint, 64 here"):
        make_trainer(dense_arguments(prefix, "*-", "--hidden-size", "64", "--load", str(run / "save")))
    folder = tmp_path / "save"
    shutil.copytree(run / "save", folder)
    (folder / "latest").write_text("step_0000099\n")  # a hint, which the newest that verifies overrules
    (folder / "notes.txt").write_text("mine")
    (folder / "step_0000002" / "notes.txt").write_text("mine")
    assert _trainer(run, "--load", str(folder)).iteration == 2


@pytest.mark.parametrize("flag", ["--save-interval", "--snapshot-interval", "--keep-last", "--digest-interval"])
def test_a_negative_interval_is_refused_by_its_name(run: Path, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}.*-1"):
        make_config(arguments(str(run / "data"), "--save", "x", flag, "-1"))
