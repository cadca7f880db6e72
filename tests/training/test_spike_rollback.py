"""Back behind a spike: the run is one that never saw the batches it leaves out, at any layout, started again or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.data.skip_list import SKIP_FILE, add_skip, read_skips
from megaforge.errors import UserError
from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.monitor.sinks import read_metrics
from megaforge.parallel.param_spec import named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.state_copy import StateCopy
from megaforge.training.trainer import Trainer
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset

BAD = 48  # a sample of the seventh batch of eight
FLAGS = ("--spike-rollback", "2", "--spike-skip-batches", "1", "--spike-window", "8", "--train-iters", "10")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


class BadBatch(Callback):
    """The batch with the sample :data:`BAD` has gradients a thousand times as large."""

    def on_gradients(self, trainer: Trainer) -> None:
        numbers = [trainer.data.number(trainer.consumed_samples + k) for k in range(8)]
        if BAD in numbers:
            for _, parameter in named_specs(trainer.model):
                parameter.main_grad.mul_(1000.0)  # type: ignore[attr-defined]


def run(trainer: Trainer) -> list[dict[str, Any]]:
    trainer.add(BadBatch())
    recorder = record(trainer)
    trainer.train()
    return recorder.records


def test_the_run_is_one_that_never_saw_them(prefix: str, tmp_path: Path) -> None:
    """The spike is in step 7; copies are of 4 and 6, of which 4 is old enough."""
    save, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    in_memory = ("--snapshot-interval", "5", "--snapshot-dir", str(tmp_path / "memory"))
    more = (*FLAGS, "--bf16", "--ema-decay", "0.9", "--grokfast", "ema")
    saved = ("--save", str(save), "--save-interval", "3", "--keep-last", "0", "--async-save", *in_memory)
    trainer = make_trainer(arguments(prefix, *more, *saved, "--metrics-file", str(metrics)))
    records = run(trainer)
    clean = make_trainer(arguments(prefix, *more))
    clean.data.leave_out([(32, 64)])
    expected = run(clean)
    assert [r["iteration"] for r in records] == [1, 2, 3, 4, 5, 6, *range(5, 11)]
    assert records[:4] == expected[:4] and records[6:] == expected[4:]
    for (name, _, ours), (_, _, theirs) in zip(trainer.optimizer.entries(), clean.optimizer.entries(), strict=True):
        assert torch.equal(ours, theirs), name
    kept = [[t for c in one.callbacks for _, _, t in c.tensors()] for one in (trainer, clean)]
    assert kept[0] and all(map(torch.equal, *kept))
    assert [row["iteration"] for row in read_metrics(metrics)] == list(range(1, 11))
    [told] = [event for event in read_events(save / EVENTS_FILE).events if event["kind"] == "rollback"]
    assert (told["step"], told["to"], told["skipped"]) == (7, 4, [32, 64]) and "grad_norm" in told["reason"]
    assert told["aside"] == ["step_0000006.abandoned"] and (save / told["replay"]).is_file()
    assert read_skips(save) == [(32, 64)]
    # From before the spike: only the file knows. From behind it: the checkpoint does.
    for step in (3, 9):
        again = make_trainer(arguments(prefix, *more, "--load", str(save / f"step_{step:07d}")))
        assert run(again) == expected[step:]
        assert all(torch.equal(tensor, weights(clean)[name]) for name, tensor in weights(again).items())
    (save / SKIP_FILE).unlink()
    assert make_trainer(arguments(prefix, *more, "--load", str(save))).data.stretches == ((32, 64),)


def losses(argv: list[str]) -> list[tuple[int, float]]:
    return [(r["iteration"], r["loss"]) for r in run(trainer_of(argv))]


def test_the_same_at_every_layout(ranks: RankPool, prefix: str) -> None:
    argv = arguments(prefix, *FLAGS, "--fp64", "--micro-batch-size", "1", "--num-workers", "1")
    expected = losses(argv)
    assert [iteration for iteration, _ in expected][6:8] == [5, 6]
    for found in ranks.run(4, losses, [*argv, "--tp", "2", "--sp", "--zero", "1"]):
        assert [pair[0] for pair in found] == [pair[0] for pair in expected]
        assert [pair[1] for pair in found] == pytest.approx([pair[1] for pair in expected], rel=1e-9)


def test_a_spike_that_comes_again_ends_the_run(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megaforge.training.spike_rollback.SpikeRollback._reason",
        lambda self, metrics: "loss spikes to 9" if metrics.iteration == 3 else None,
    )
    trainer = make_trainer(arguments(prefix, *FLAGS))
    with pytest.raises(UserError, match="iteration 3: loss spikes to 9, and the run has gone back to iteration 0 3 "):
        trainer.train()
    assert trainer.data.stretches == ((0, 96),), "three times three batches, and each time one more"


def test_gradients_that_stay_not_finite_take_it_back(prefix: str) -> None:
    class Spoiling(Callback):
        def on_gradients(self, trainer: Trainer) -> None:
            if trainer.data.number(trainer.consumed_samples) in (16, 24):
                next(p for _, p in named_specs(trainer.model)).main_grad.fill_(float("nan"))  # type: ignore[attr-defined]

    trainer = make_trainer(
        arguments(prefix, "--spike-rollback", "2", "--skip-nonfinite-steps", "1", "--train-iters", "4")
    )
    trainer.add(Spoiling())
    recorder = record(trainer)
    trainer.train()
    assert [(r["iteration"], r["skipped"]) for r in recorder.records] == [(1, 0), (2, 0), (3, 1), (3, 0), (4, 0)]
    assert trainer.data.stretches == ((16, 32),)


def test_a_copy_holds_everything(prefix: str) -> None:
    trainer = make_trainer(arguments(prefix, "--train-iters", "4", "--hidden-dropout", "0.1", "--ema-decay", "0.5"))
    copy = StateCopy()

    class Taking(Callback):
        def on_step_end(self, trainer: Trainer, metrics: Any) -> None:
            if metrics.iteration == 2:
                copy.take(trainer)

    trainer.add(Taking())
    trainer.train()
    after = weights(trainer)
    copy.restore(trainer)
    assert (trainer.iteration, trainer.consumed_samples) == (2, 16)
    assert not all(torch.equal(tensor, after[name]) for name, tensor in weights(trainer).items())
    trainer.train()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(trainer).items())


def test_the_list_is_whole_or_refused(tmp_path: Path) -> None:
    assert read_skips(tmp_path) == []
    add_skip(tmp_path, (8, 24), step=7)
    with (tmp_path / SKIP_FILE).open("a") as file:
        file.write('{"first": 40')  # was never acted upon
    assert read_skips(tmp_path) == [(8, 24)]
    add_skip(tmp_path, (40, 48))
    assert read_skips(tmp_path) == [(8, 24), (40, 48)]
    for line in ("[]", '{"first": 9, "stop": 9}', '{"first": "1", "stop": 2}', "nonsense"):
        (tmp_path / SKIP_FILE).write_text(line + "\n")
        with pytest.raises(UserError, match="line 1 is not a stretch of samples"):
            read_skips(tmp_path)
