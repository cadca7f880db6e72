"""A suspect gradient is computed again: the same bits go on, others end the run and name the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.errors import UserError
from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset

FLAGS = ("--repeat-suspect-steps", "--spike-window", "8", "--train-iters", "4", "--micro-batch-size", "1")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class Faulty(Callback):
    """Step 3: a gradient that is too large or not finite, every time or the first time alone; or weights that are wrong
    while the first forward pass runs, on one rank."""

    def __init__(self, kind: str, rank: int = 0) -> None:
        self.kind, self.rank, self.tries = kind, rank, 0

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.iteration == 2 and self.kind == "forward" and trainer.ctx.world.rank == self.rank:
            self.tries += 1
            self._scale(trainer, 64.0 if self.tries == 1 else 1.0)

    def _scale(self, trainer: Trainer, factor: float) -> None:
        parameter = next(parameter for _, parameter in named_specs(trainer.model))
        with torch.no_grad():
            parameter.mul_(factor)

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.iteration != 2:
            return
        if self.kind == "forward":
            if trainer.ctx.world.rank == self.rank and self.tries == 1:
                self._scale(trainer, 1 / 64.0)
            return
        self.tries += 1
        if "once" in self.kind and self.tries > 1:
            return
        for _, parameter in named_specs(trainer.model):
            parameter.main_grad.mul_(float("nan") if "nan" in self.kind else 1000.0)  # type: ignore[attr-defined]


def test_equal_bits_go_on(prefix: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    trainer = make_trainer(arguments(prefix, *FLAGS, "--hidden-dropout", "0.1", "--save", str(save)))
    without = FLAGS[FLAGS.index("--train-iters") :]
    plain = make_trainer(arguments(prefix, *without, "--hidden-dropout", "0.1"))
    for one in (trainer, plain):
        one.add(Faulty("large"))
    recorder = record(trainer)
    trainer.train()
    plain.train()
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(trainer).items())
    [told] = [event for event in read_events(save / EVENTS_FILE).events if event["kind"] == "repeat"]
    assert told["step"] == 3 and told["equal"] and "grad_norm" in told["reason"] and len(recorder.records) == 4
    nan = make_trainer(arguments(prefix, *FLAGS))
    nan.add(Faulty("nan"))
    with pytest.raises(UserError, match="so the run ends before it can harm"):
        nan.train()


@pytest.mark.parametrize("kind", ["once nan", "once large"])
def test_other_bits_end_the_run(prefix: str, kind: str) -> None:
    trainer = make_trainer(arguments(prefix, *FLAGS, "--skip-nonfinite-steps", "3"))
    trainer.add(Faulty(kind))
    with pytest.raises(UserError, match=r"iteration 3: .* it has other bits: .*\(a backward pass or a sum over ranks"):
        trainer.train()
    assert trainer.iteration == 2


def complaint(argv: list[str]) -> str:
    trainer: Any = trainer_of(argv)
    trainer.add(Faulty("forward", rank=1))
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    return "nothing"


def test_the_rank_is_named(ranks: RankPool, prefix: str) -> None:
    for told in ranks.run(2, complaint, arguments(prefix, *FLAGS)):
        assert "spikes to" in told and "(rank 1 on " in told
