"""Out of memory: the same step in smaller pieces, on all ranks, or a clear end that the next start follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaforge.errors import UserError
from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.resilience.requests import Requests
from megaforge.training.engine import Engine
from megaforge.training.micro_batches import FILE, is_out_of_memory
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    base = ("--micro-batch-size", "4", "--halve-micro-batch-on-oom", "--train-iters", "3", "--fp64", "--hidden-dropout")
    return arguments(prefix, *base, "0.1", "--grokfast", "ema", *more)


def short_of_memory(fits: int, rank: int, step: int) -> Any:
    """Ranks whose backward pass, in the middle of a step, has room for micro-batches of ``fits``."""
    engine_step = [0]
    forward_backward = Engine.forward_backward

    def counted(self: Engine, batches: Any, objective: Any) -> Any:
        engine_step[0] += 1
        hit = self.ctx.world.rank == rank and engine_step[0] >= step and len(batches[0].tokens) > fits
        if not hit:
            return forward_backward(self, batches, objective)
        calls = [0]
        pipeline = self._pipeline.run

        def run(*args: Any, **kwargs: Any) -> Any:
            loss_fn = args[1]

            def failing(output: Any, batch: Any) -> Any:
                calls[0] += 1
                if calls[0] == len(batches):  # what came before has left its gradients
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
                return loss_fn(output, batch)

            return pipeline(args[0], failing, **kwargs)

        with mock.patch.object(self._pipeline, "run", run):
            return forward_backward(self, batches, objective)

    return mock.patch.object(Engine, "forward_backward", counted)


def run(argv: list[str], fits: int, rank: int) -> dict[str, Any]:
    trainer = trainer_of(argv)
    recorder = record(trainer)
    with short_of_memory(fits, rank, step=2):
        trainer.train(Requests())
    return {"records": recorder.records, "now": trainer.micro_batches.now, "weights": weights(trainer)}


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert ours.pop("kind") == "step"
        assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-9, abs=1e-12)
    for name, tensor in found["weights"].items():
        if tensor.shape == expected["weights"][name].shape:  # a share of a weight shows in the loss of the next step
            torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-8, atol=1e-11)


def test_the_step_is_made_again_in_smaller_pieces(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    plain = run(flags(prefix), 4, 0)
    assert plain["now"] == 4
    one = run(flags(prefix, "--save", str(save), "--digest-interval", "1"), 1, 0)
    assert one["now"] == 1
    alike(one, plain)
    told = [event for event in read_events(save / EVENTS_FILE).events if event["kind"] == "out_of_memory"]
    assert [(e["step"], e["ranks"], e["micro_batch_size"]) for e in told] == [(2, [0], 2), (2, [0], 1)]
    again = make_trainer(flags(prefix, "--save", str(save), "--load", str(save), "--train-iters", "3"))
    again.micro_batches.follow()
    assert again.micro_batches.now == 1
    for found in ranks.run(2, run, flags(prefix, "--zero", "1"), 2, 1):
        assert found["now"] == 2
        alike(found, plain)


def test_where_others_cannot_be_told_the_next_start_is_smaller(prefix: str, tmp_path: Path) -> None:
    save = tmp_path / "run"
    line = flags(prefix, "--save", str(save))
    trainer = make_trainer(line)
    trainer.micro_batches._in_job = False
    with (
        short_of_memory(2, 0, step=1),
        pytest.raises(UserError, match="memory does not suffice .*started again it tak"),
    ):
        trainer.train()
    assert json.loads((save / FILE).read_text())["micro_batch_size"] == 2
    again = make_trainer(line)
    again.train(Requests())
    assert again.micro_batches.now == 2
    (save / FILE).write_text("nonsense")
    other = make_trainer([*line, "--load", str(save)])
    other.micro_batches.follow()
    assert other.micro_batches.now == 4


def test_what_cannot_be_halved_says_so(prefix: str) -> None:
    trainer = make_trainer(flags(prefix, "--micro-batch-size", "1"))
    with short_of_memory(0, 0, step=1), pytest.raises(UserError, match="--micro-batch-size 1: .*--recompute full"):
        trainer.train()
    silent = make_trainer([one for one in flags(prefix) if one != "--halve-micro-batch-on-oom"])
    with short_of_memory(0, 0, step=1), pytest.raises(torch.OutOfMemoryError):
        silent.train()


def test_what_is_out_of_memory() -> None:
    cpu = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    assert is_out_of_memory(RuntimeError(cpu)) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(
        ValueError("out of memory")
    )
