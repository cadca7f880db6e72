"""Static steps from an average of the largest values; clips that evaluations choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.quant.statistics import quantized_layers
from megaforge.training.callbacks import Callback
from megaforge.training.clip_search import ClipSearch
from megaforge.training.trainer import Trainer
from tests.training.tiny import dense_arguments, make_trainer, record, weights, write_dataset

TERNARY = ("--quantize-weights", "ternary")
# Of eight samples a step: steps 1, 2, 4 and 5 are watched.
CALIBRATED = (*TERNARY, "--online-calibration", "--calibration-interval", "3", "--calibration-samples", "16")
CHOSEN = ("--quant-clip", "both", "--quant-clip-interval", "2", "--quant-clip-grid", "0.5", "0.8", "1.2")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class Largest(Callback):
    """The largest value that a layer is given in each step."""

    def __init__(self, trainer: Trainer) -> None:
        _, layer, self.op = quantized_layers(trainer.model)[-1]
        self.found: list[float] = []
        self.ranges: list[float] = []
        layer.register_forward_pre_hook(self.look)

    def look(self, layer: Any, given: Any) -> None:
        if layer.training:
            self.now.append(float(given[0].detach().abs().max()))

    def on_step_start(self, trainer: Trainer) -> None:
        self.now: list[float] = []

    def on_step_end(self, trainer: Trainer, metrics: Any) -> None:
        assert self.op.ranges is not None and self.op.ranges.input is not None
        self.found.append(max(self.now))
        self.ranges.append(float(self.op.ranges.input))


def test_ranges_are_averages_of_the_watched_steps_and_go_on(prefix: str, tmp_path: Path) -> None:
    argv = dense_arguments(prefix, "R-*-", *CALIBRATED, *CHOSEN, "--eval-iters", "1", "--calibration-ema", "0.75")
    trainer = make_trainer(argv)
    watcher, recorder = Largest(trainer), record(trainer)
    trainer.add(watcher)
    trainer.train()
    expected: list[float] = []
    for step, largest in enumerate(watcher.found):
        mean = expected[-1] if expected else largest
        expected.append(mean if step % 3 == 2 else 0.75 * mean + 0.25 * largest)
    assert watcher.ranges == pytest.approx(expected, rel=1e-6) and len(expected) == 6
    chosen = [{k: v for k, v in one.items() if k.startswith("quant_clip")} for one in recorder.records if "lr" in one]
    assert chosen[0] == {"quant_clip_weights": 1.0, "quant_clip_activations": 1.0}
    assert all(one in (0.5, 0.8, 1.0, 1.2) for of_step in chosen for one in of_step.values())
    assert all(known("step", name) for name in chosen[0])
    save = ("--save", str(tmp_path / "run"))
    make_trainer([*argv, *save, "--exit-interval", "4"]).train()
    resumed = make_trainer([*argv, *save, "--load", str(tmp_path / "run")])
    resumed.train()
    theirs = weights(trainer)
    assert any(name.endswith("ranges.input") for name in theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(resumed).items())


def test_a_full_precision_checkpoint_begins_without_ranges(prefix: str, tmp_path: Path) -> None:
    plain = make_trainer(dense_arguments(prefix, "R-*-", "--train-iters", "1", "--save", str(tmp_path / "run")))
    plain.train()
    load = ("--load", str(tmp_path / "run"), "--finetune", "--train-iters", "1")
    static = make_trainer(dense_arguments(prefix, "R-*-", *CALIBRATED, *load))
    ops = [op for _, _, op in quantized_layers(static.model)]
    assert not any(op.ranges.has_input for op in ops if op.ranges is not None)
    static.train()
    assert all(op.ranges.has_input for op in ops if op.ranges is not None)


def test_the_least_validation_loss_chooses(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The chosen factors measure no worse than any other of their grid, and evaluations between are not told."""
    more = ("--eval-iters", "1", "--train-iters", "2", "--lr", "3e-3")
    trainer = make_trainer(dense_arguments(prefix, "R-*-", *TERNARY, *CHOSEN, *more))
    recorder = record(trainer)
    trainer.train()
    told = [line for line in capsys.readouterr().err.splitlines() if "clip of" in line]
    assert len(told) == 2 and "iteration 2: clip of weights " in told[0] and "1.2)" in told[1]
    assert [one["kind"] for one in recorder.records] == ["step", "step", "evaluation"]
    [search] = [one for one in trainer.callbacks if isinstance(one, ClipSearch)]
    best = trainer.measure().loss
    for factor in (0.5, 0.8, 1.2):
        search._set(trainer, "activations", factor)
        assert trainer.measure().loss >= best * (1 - 2e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--online-calibration",), "--online-calibration: no activation is quantized"),
        ((*TERNARY, "--quant-clip-grid", "0"), "--quant-clip-grid 0: must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(prefix: str, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(dense_arguments(prefix, "R-*-", *more))
