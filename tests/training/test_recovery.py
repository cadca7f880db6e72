"""What a step does about a gradient that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaforge.config.resilience_config import ResilienceConfig
from megaforge.errors import UserError
from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.replay_file import REPLAY
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class Spoiling(Callback):
    """Puts a NaN into one gradient of some steps, on one rank."""

    def __init__(self, *steps: int, rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.iteration + 1 in self.steps and trainer.ctx.world.rank == self.rank:
            next(parameter for _, parameter in named_specs(trainer.model)).main_grad.view(-1)[-1] = float("nan")  # type: ignore[attr-defined]


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    kept = [tensor for callback in trainer.callbacks for _, _, tensor in callback.tensors()]
    return [tensor.clone() for tensor in (*(t for _, _, t in trainer.optimizer.entries()), *kept)]


def test_a_step_without_a_finite_gradient_changes_nothing(prefix: str, tmp_path: Path) -> None:
    """The step counts, its batch is consumed and kept for inspection; weights, moments and averages stay to the bit."""
    save = tmp_path / "run"
    flags = ("--skip-nonfinite-steps", "2", "--ema-decay", "0.5", "--save", str(save), "--save-interval", "1")
    trainer = make_trainer(arguments(prefix, *flags, "--train-iters", "5", "--keep-last", "0"))
    states: list[list[torch.Tensor]] = []

    class Watching(Callback):
        def on_step_end(self, trainer: Trainer, metrics: Any) -> None:
            states.append(state_of(trainer))

    trainer.add(Spoiling(2, 3, 5))
    trainer.add(Watching())
    recorder = record(trainer)
    trainer.train()
    assert [r["skipped"] for r in recorder.records] == [0, 1, 1, 0, 1]
    assert [r["consumed_samples"] for r in recorder.records] == [8, 16, 24, 32, 40]
    same = [all(map(torch.equal, a, b)) for a, b in zip(states, states[1:], strict=False)]
    assert same == [True, True, False, True]
    skips = [event for event in read_events(save / EVENTS_FILE).events if event["kind"] == "skip"]
    assert [(e["step"], e["in_a_row"], e["samples"]) for e in skips] == [
        (2, 1, [8, 16]),
        (3, 2, [16, 24]),
        (5, 1, [32, 40]),
    ]
    told = json.loads((save / skips[1]["replay"]).read_text())
    assert told["start_from"] == "step_0000002" and told["samples"] == [16, 24] and told["grad_norm"] == "nan"
    tokens = np.load(save / REPLAY / told["tokens"], allow_pickle=False)
    for k in range(16, 24):
        assert np.array_equal(tokens[k - 16], trainer.data.sample(k).tokens.numpy())
    resumed = make_trainer(arguments(prefix, *flags, "--train-iters", "5", "--load", str(save / "step_0000003")))
    assert (resumed.leaving_out.in_a_row, resumed.leaving_out.total) == (2, 2)
    resumed.add(Spoiling(4))
    before = weights(resumed)
    assert ResilienceConfig().skip_nonfinite_steps == 0, "a run that does not ask for it ends"
    with pytest.raises(UserError, match="iteration 4: the gradient norm is nan, after 2 steps in a row"):
        resumed.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(resumed).items())


def spoiled(argv: list[str]) -> tuple[list[Any], bool]:
    trainer = trainer_of(argv)
    trainer.add(Spoiling(2, rank=trainer.ctx.world.size - 1))
    recorder = record(trainer)
    trainer.train()
    return [r["skipped"] for r in recorder.records], all(t.isfinite().all() for t in weights(trainer).values())


def test_all_ranks_leave_the_step_out(ranks: RankPool, prefix: str) -> None:
    """What compression keeps of earlier gradients must not carry the NaN on."""
    argv = arguments(prefix, "--skip-nonfinite-steps", "1", "--train-iters", "3", "--micro-batch-size", "1")
    assert ranks.run(4, spoiled, [*argv, "--tp", "2", "--zero", "1"]) == [([0, 1, 0], True)] * 4
    assert ranks.run(2, spoiled, [*argv, "--grad-compression", "powersgd"]) == [([0, 1, 0], True)] * 2
