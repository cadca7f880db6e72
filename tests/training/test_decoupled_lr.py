"""Rates and decays of their own, and numbers of all weights: a run at another layout has the same."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.monitor.sinks import read_metrics
from megaforge.training.callbacks import Callback
from megaforge.training.manual_gc import ManualCollection
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from megaforge.training.weight_decay import GrowingDecay
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.training.tiny import arguments, make_config, make_trainer, record, weights, write_dataset

RATES = ("--lr-decay-style", "linear", "--min-lr", "1e-4", "--decoupled-lr", "4e-3", "--decoupled-min-lr", "0")
DECAY = ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay", "0.5")
SEEN = ("--log-params-norm", "--log-num-zeros-in-grad", "--train-iters", "3", "--fp64")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


class Moved(Callback):
    """By how much each step moves the weights, relative to others of the run."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.norms: list[float] = []
        self.zeros: list[int] = []

    def on_gradients(self, trainer: Trainer) -> None:
        self.before = weights(trainer)
        self.zeros.append(sum(int((one.grad == 0).sum()) for one in trainer.optimizer.main.trained))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        after = weights(trainer)
        self.norms.append(math.sqrt(sum(float(one.double().square().sum()) for one in after.values())))


def test_embedding_and_head_have_their_own_rate(prefix: str) -> None:
    """The first step of Adam moves a weight by about the rate, wherever it has a gradient."""
    trainer, moved = make_trainer(arguments(prefix, *RATES, *DECAY, *SEEN, "--train-iters", "3")), Moved()
    trainer.add(moved)
    records = record(trainer).records
    first = make_trainer(arguments(prefix, *RATES, *SEEN, "--train-iters", "3", "--weight-decay", "0"))
    before = weights(first)
    first.train_step(next(iter(first._loader(first.data, first.batches))))
    moves = {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(first).items()}
    ends = {name: move for name, move in moves.items() if name.startswith(("embedding", "head"))}
    rates = [1e-4 + 9e-4 * left for left in (2 / 3, 1 / 3, 0)]
    assert ends and max(ends.values()) == pytest.approx(4e-3 * 2 / 3, rel=1e-3)
    assert max(moves[name] for name in moves.keys() - ends) == pytest.approx(rates[0], rel=1e-3)
    trainer.train()
    assert [r["lr"] for r in records] == pytest.approx(rates)
    assert [r["decoupled_lr"] for r in records] == pytest.approx([4e-3 * left for left in (2 / 3, 1 / 3, 0)])
    assert [r["weight_decay"] for r in records] == pytest.approx([0.1 + 0.4 * done / 3 for done in (1, 2, 3)])
    assert [r["params_norm"] for r in records] == pytest.approx(moved.norms, rel=1e-12)
    assert [r["num_zeros"] for r in records] == moved.zeros and moved.zeros[0] > 0


def test_other_layouts_have_the_same(ranks: RankPool, prefix: str) -> None:
    line = arguments(prefix, *RATES, *DECAY, *SEEN, "--untie-embeddings-and-output-weights", "--train-iters", "2")
    expected = train(line)
    for record_ in expected["records"]:
        assert record_["num_zeros"] > 0
    compare(ranks.run(4, train, [*line, "--tp", "2", "--zero-stage", "1"]), expected, 1e-9)


@pytest.mark.parametrize(("style", "half"), [("linear", 0.3), ("cosine", 0.3), ("cosine", None)])
def test_decay_grows_as_megatrons(style: str, half: float | None) -> None:
    grows = GrowingDecay.of(make_config([*DECAY[2:], "--weight-decay-incr-style", style]))
    assert grows is not None and grows.at(10, 10) == pytest.approx(0.5) == grows.at(12, 10)
    if half is not None:
        assert grows.at(5, 10) == pytest.approx(half)
    else:
        assert grows.at(2, 10) == pytest.approx(0.1 + 0.4 * 0.5 * (math.cos(math.pi * 0.8) + 1))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (DECAY[:2], "add --start-weight-decay and --end-weight-decay"),
        ((*DECAY[:4], "--end-weight-decay", "0"), "--end-weight-decay 0.0: must be at least --start-weight-decay 0.1"),
        ((*DECAY, "--weight-decay", "0"), "leave out --weight-decay"),
        (("--decoupled-lr", "1e-3", "--decoupled-min-lr", "2e-3"), "--decoupled-min-lr 0.002: must not exceed"),
        (("--decoupled-lr", "1e-5", "--min-lr", "1e-4"), "--min-lr 0.0001: must not exceed --decoupled-lr 1e-05"),
        (("--decoupled-lr", "1e-5", "--lr-warmup-init", "1e-4", "--lr-warmup-iters", "3"), "--lr-warmup-init 0.0001"),
    ],
)
def test_impossible_ends_are_refused(line: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_config(line)


def test_garbage_is_collected_when_it_is_due(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    line = arguments(prefix, "--manual-gc", "--manual-gc-interval", "2", "--train-iters", "5", "--eval-iters", "1")
    trainer = make_trainer(line)
    monkeypatch.setattr(gc, "collect", lambda: seen.append((trainer.iteration, gc.isenabled())))
    trainer.train()
    assert seen == [(0, False), (2, False), (4, False), (5, False)] and gc.isenabled()
    assert ManualCollection.of(make_config([])) is None


def test_skip_train_evaluates_and_leaves(prefix: str, tmp_path: Path) -> None:
    save = str(tmp_path / "run")
    line = arguments(prefix, "--eval-iters", "2", "--train-iters", "2")
    whole = make_trainer([*line, "--save", save])
    evaluated = record(whole)
    whole.train()
    file = tmp_path / "m.jsonl"
    file.write_text('{"kind": "step", "iteration": 7, "loss": 1.0}\n')
    again = make_trainer([*line, "--load", save, "--train-iters", "9", "--skip-train", "--metrics-file", str(file)])
    records = record(again).records
    again.train()
    assert again.iteration == 2 and records == evaluated.records[-1:], "the same numbers, and no step"
    assert [one["iteration"] for one in read_metrics(file)] == [7, 2], "what a run has written stays"


def test_the_test_part_is_measured_at_the_end(prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a validation of the same documents would be; not where the run only pauses."""
    file, save = str(tmp_path / "m.jsonl"), str(tmp_path / "run")
    other = write_dataset(tmp_path / "other", documents=12, seed=3)
    apart = ("--train-data-path", prefix, "--eval-iters", "2", "--train-iters", "2", "--valid-data-path", other)
    line = [word for word in arguments("x", *apart) if word not in ("--data-path", "x", "--split", "80,20,0")]
    tested = ("--test-data-path", other, "--eval-test", "--metrics-file", file, "--save", save, "--load", save)
    make_trainer([*line, *tested, "--exit-interval", "1"]).train()
    assert {one["kind"] for one in read_metrics(file)} == {"step", "evaluation"}
    make_trainer([*line, *tested]).train()
    valid, test = read_metrics(file)[-2:]
    assert (valid.pop("kind"), test.pop("kind")) == ("evaluation", "test") and valid == test
    assert "test at iteration 2: loss" in capfd.readouterr().out
    with pytest.raises(UserError, match="no document is for tests"):
        parse_config([*line, "--eval-test"])
    few = make_trainer(
        arguments(prefix, "--eval-iters", "1", "--eval-test", "--split", "90,9,0.1", "--train-iters", "1")
    )
    few.train()
    assert "--eval-test: no test at the end: --split 90,9,0.1 leaves no documents" in capfd.readouterr().err
