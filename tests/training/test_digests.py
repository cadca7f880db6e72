"""Digests of a run, and where two runs part."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.monitor.compare_digests import first_difference, read_digests
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.training.trainer import Trainer
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, write_dataset
from tools import compare_runs


def flags(prefix: str, file: Path, *more: str) -> list[str]:
    return arguments(
        prefix, "--digest-interval", "2", "--digest-file", str(file), "--fp64", "--train-iters", "4", *more
    )


def run(argv: list[str]) -> None:
    trainer_of(argv).train()


def test_layouts_have_the_same_digests(ranks: Any, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    for name, more in (("a", ()), ("again", ()), ("recomputed", ("--recompute", "full"))):
        make_trainer(flags(prefix, tmp_path / name, *more)).train()
    alone = read_digests(tmp_path / "a")
    assert list(alone) == [2, 4] and list(alone[2]["activations"]) == ["layers.0", "layers.1"]
    for name in ("again", "recomputed"):
        assert first_difference(alone, read_digests(tmp_path / name)) is None
    for name, size, layout in (("tp", 2, ("--tp", "2", "--sp")), ("pp", 4, ("--pp", "2", "--zero", "1"))):
        ranks.run(size, run, flags(prefix, tmp_path / name, *layout))
        assert first_difference(alone, read_digests(tmp_path / name), rtol=1e-9) is None, name


def one_bit_off(trainer: Trainer) -> Callable[..., Any]:
    """An update that turns over a bit of a weight of the second block in the third step."""
    original = trainer.optimizer.step

    def step(*given: Any) -> Any:
        result = original(*given)
        for one in trainer.optimizer.main.trained if trainer.iteration == 2 else ():
            if optimizer_shard(one.parameter).name == "layers.1.mixer.output.weight":
                one.master.data.view(torch.int64).view(-1)[5] ^= 1 << 40
        return result

    return step


def test_the_first_layer_that_differs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    for name in ("a", "b"):
        trainer = make_trainer(flags(prefix, tmp_path / name, "--save", str(tmp_path / f"run-{name}")))
        if name == "b":
            monkeypatch.setattr(trainer.optimizer, "step", one_bit_off(trainer))
        trainer.train()
    parting = first_difference(read_digests(tmp_path / "a"), read_digests(tmp_path / "b"))
    assert parting is not None and (parting.iteration, parting.name) == (4, "layers.1")
    assert first_difference(read_digests(tmp_path / "a"), read_digests(tmp_path / "b"), rtol=1e-2) is None
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "a"), str(tmp_path / "b")])
    assert compare_runs.main() == 1
    printed = capsys.readouterr().out
    assert "iteration 4: activations of layers.1 differ" in printed and "last equal iteration on record is 2" in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rtol", "1e-2"])
    assert compare_runs.main() == 0 and "equal within 0.01 in 2 steps, 2 to 4" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path: Path) -> None:
    empty = {"activations": {}, "gradients": {}, "weights": {}}
    (tmp_path / "digests.jsonl").write_text(json.dumps({"iteration": 2, **empty}) + "\n{half a li")
    assert list(read_digests(tmp_path)) == [2]  # it was killed while it wrote
    with pytest.raises(UserError, match="--digest-interval N writes one"):
        read_digests(tmp_path / "nothing")
    (tmp_path / "bad").write_text("{}\n" + json.dumps({"iteration": 2, **empty}) + "\n")
    with pytest.raises(UserError, match="bad: line 1 is not a record"):
        read_digests(tmp_path / "bad")
    (tmp_path / "none").write_text("")
    with pytest.raises(UserError, match="no records"):
        read_digests(tmp_path / "none")
    one, other = {2: empty}, {3: empty}
    with pytest.raises(UserError, match="no iteration is in both: 2 to 2 and 3 to 3"):
        first_difference(one, other)
    with pytest.raises(UserError, match="w: only one of the runs has weights"):
        first_difference(one, {2: {**empty, "weights": {"w": ["00", 1.0]}}})
    nan = {2: {**empty, "weights": {"w": ["00", float("nan")], "layers.10": ["00", 1.0], "layers.9": ["00", 1.0]}}}
    changed = {2: {**empty, "weights": {"w": ["00", float("nan")], "layers.10": ["01", 1.0], "layers.9": ["01", 1.0]}}}
    assert first_difference(nan, nan) is None
    parting = first_difference(nan, changed)
    assert parting is not None and (parting.name, parting.relative, parting.others) == ("layers.9", 0.0, 1)
