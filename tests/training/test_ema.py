"""The average of weights against torch's at each step, at a sharded layout, resumed, and in evaluations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.ema import WeightAverage
from megaforge.training.other_weights import OtherWeights
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, record, write_dataset
from tools import evaluate

EVALUATED = ("--eval-iters", "1", "--eval-interval", "1")
EMA = ("--ema-decay", "0.8")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def average_of(trainer: Trainer) -> WeightAverage:
    [found] = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
    return found


def averages(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, _, tensor in average_of(trainer).tensors()}


class Torchs(Callback):
    """torch's average of the same masters, compared after each update."""

    def __init__(self, trainer: Trainer) -> None:
        self.masters = [main.master for main in trainer.optimizer.main.trained]
        self.model = AveragedModel(self._module(), multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.compared = 0

    def _module(self) -> nn.Module:
        return nn.ParameterList([nn.Parameter(master.detach().clone()) for master in self.masters])

    def on_update(self, trainer: Trainer) -> None:
        self.model.update_parameters(self._module())
        for ours, theirs in zip(average_of(trainer).averages, self.model.module.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        self.compared += 1


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
def test_it_is_torchs_at_each_step(prefix: str, precision: tuple[str, ...]) -> None:
    trainer = make_trainer(arguments(prefix, *EMA, *precision))
    oracle = Torchs(trainer)
    trainer.add(oracle)
    trainer.train()
    assert oracle.compared == 6 == average_of(trainer).updates
    assert {average.dtype for average in average_of(trainer).averages} == {torch.float32}


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
def test_other_weights_are_in_place_for_a_while(prefix: str, precision: tuple[str, ...]) -> None:
    trainer = make_trainer(arguments(prefix, *precision))
    main, model = trainer.optimizer.main, trainer.model
    was, taken, nothing = [one.master.clone() for one in main.trained], OtherWeights(main), OtherWeights(main)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    taken.take()
    for other, kept in ((nothing, False), (taken, True)):
        with other.in_place():
            trained = {spec.name for spec, parameter in named_specs(model) if parameter.requires_grad}
            for spec, parameter in named_specs(model):
                if spec.name in trained:
                    assert bool(parameter.detach().any()) == (kept and bool(own[spec.name].any())), spec.name
        assert all(torch.equal(one.master, before) for one, before in zip(main.trained, was, strict=True))
        assert all(torch.equal(parameter, own[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=str)
def test_evaluations_use_it_and_training_does_not(prefix: str, precision: tuple[str, ...]) -> None:
    argv = arguments(prefix, *EVALUATED, *precision)
    plain, with_it = make_trainer(argv), make_trainer([*argv, *EMA, "--ema-evaluate"])
    records = [record(plain), record(with_it)]
    plain.train()
    with_it.train()
    steps, judged = ([[r for r in one.records if r["kind"] == kind] for one in records] for kind in _KINDS)
    assert steps[0] == steps[1]
    assert judged[0][0] == judged[1][0], "the first update copies"
    assert all(one["loss"] != other["loss"] for one, other in zip(judged[0][1:], judged[1][1:], strict=True))
    for one, other in zip(plain.optimizer.entries(), with_it.optimizer.entries(), strict=True):
        assert torch.equal(one[2], other[2]), one[0]
    for (spec, one), (_, other) in zip(named_specs(plain.model), named_specs(with_it.model), strict=True):
        assert torch.equal(one, other), spec.name
    with torch.no_grad():
        for main, average in zip(plain.optimizer.main.trained, average_of(with_it).averages, strict=True):
            main.master.copy_(average)
    plain.optimizer.after_load()
    assert plain.evaluate().loss == judged[1][-1]["loss"]


_KINDS = ("step", "evaluation")


def test_an_evaluation_that_fails_leaves_the_weights(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, *EMA, "--bf16"))
    trainer.train()
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="broken"), average_of(trainer).in_place():
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        raise RuntimeError("broken")
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def run_twice(argv: list[str], folder: str) -> dict[str, Any]:
    """Four steps, and the last two again from a checkpoint."""
    whole = trainer_of([*argv, "--save", folder, "--save-interval", "2"])
    recorder = record(whole)
    whole.train()
    resumed = trainer_of([*argv, "--save", folder, "--load", f"{folder}/step_0000002"])
    again = record(resumed)
    resumed.train()
    pairs = zip(averages(whole).items(), averages(resumed).items(), strict=True)
    return {
        "records": recorder.records,
        "again": again.records,
        "differ": [name for (name, one), (_, two) in pairs if not torch.equal(one, two)],
        "updates": average_of(resumed).updates,
    }


def test_sharded_resumed_and_resharded(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    argv = arguments(prefix, "--fp64", *EVALUATED, *EMA, "--ema-evaluate", "--train-iters", "4")
    alone = make_trainer(argv)
    expected = record(alone)
    alone.train()
    save = str(tmp_path / "run")
    for one in ranks.run(4, run_twice, [*argv, "--tp", "2", "--zero", "1"], save):
        assert one["differ"] == [] and one["updates"] == 4
        assert one["again"] == [entry for entry in one["records"] if entry["iteration"] > 2]
        for ours, theirs in zip(one["records"], expected.records, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    loaded = make_trainer([*argv, "--load", save])
    for (name, ours), theirs in zip(averages(loaded).items(), averages(alone).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_tools_take_it(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, plain = str(tmp_path / "run"), str(tmp_path / "plain")
    trainer = make_trainer(arguments(prefix, *EMA, "--lr", "1e-2", "--save", save))
    trainer.train()
    by_hand = averages(trainer)
    with torch.no_grad():
        for main in trainer.optimizer.main.trained:
            main.master.copy_(by_hand[main.spec.name])
    trainer.optimizer.after_load()
    object.__setattr__(trainer.config.checkpoint, "save", str(tmp_path / "by_hand"))
    trainer.saved_iteration = 0
    trainer.save()

    def loss(folder: str, *more: str) -> float:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["evaluate", "--load", folder, "--input", prefix, "--json", *more])
        evaluate.main()
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["ema"] == bool(more)
        return float(told["ours"]["loss"])

    assert loss(save, "--ema") == loss(str(tmp_path / "by_hand")) != loss(save)
    make_trainer(arguments(prefix, "--train-iters", "1", "--save", plain)).train()
    with pytest.raises(UserError, match=r"--ema: .*plain.* keeps no average of the weights"):
        load_trained_model(plain, device="cpu", ema=True)


def test_a_run_without_one_begins_it(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = str(tmp_path / "run")
    make_trainer(arguments(prefix, "--train-iters", "2", "--save", save)).train()
    trainer = make_trainer(arguments(prefix, *EMA, "--load", save))
    trainer.train()
    assert "no average in what was loaded" in "".join(capsys.readouterr())
    assert average_of(trainer).updates == 4
