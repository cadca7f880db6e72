"""Grokfast against its published code, bit for bit: from checkpoints, under ZeRO, with a scaled loss."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim import MainParameters, gradient_filter
from megaforge.optim.gradient_filter import GradientFilter, filter_rows, make_filter
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Checkpointing, ExitInterval
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from megaforge.verification.dry_run import try_ranks
from tests.optim.small_model import SPECS, SmallModel, set_gradients
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_config, make_trainer, weights, write_dataset

EMA = OptimizerConfig(grokfast="ema")
MA = OptimizerConfig(grokfast="ma", grokfast_window=3, grokfast_lambda=5.0)
WINDOW = ("--grokfast", "ma", "--grokfast-window", "3")
FLAGS = {"ema": ("--grokfast", "ema"), "ma": WINDOW}


class Published:
    """``gradfilter_ema`` and ``gradfilter_ma`` of github.com/ironjr/grokfast (grokfast.py), for one parameter."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.mean: Tensor | None = None
        self.window: deque[Tensor] = deque(maxlen=config.grokfast_window)

    def __call__(self, grad: Tensor) -> Tensor:
        if self.config.grokfast == "ema":
            alpha, lamb = 0.98, 2.0
            before = grad if self.mean is None else self.mean
            self.mean = before * alpha + grad.detach() * (1 - alpha)
            return grad + self.mean * lamb
        self.window.append(grad.detach().clone())
        if len(self.window) < self.config.grokfast_window:
            return grad
        return grad + sum(self.window) / len(self.window) * 5.0


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.nan_to_num(nan=1.5), theirs.nan_to_num(nan=1.5))


def make(config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> tuple[SmallModel, GradientFilter]:
    model = SmallModel(ParallelContext.single(), dtype)
    made = make_filter(config, MainParameters(model).trained)
    assert made is not None
    return model, made


def gradients(step: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {s.name: scale * torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in SPECS}


@pytest.mark.parametrize("config", [EMA, MA], ids=["ema", "ma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
def test_every_step_has_the_bits_of_the_published_code(
    config: OptimizerConfig, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gradient_filter._STRETCH, "cpu", 17)  # stretches end inside of parameters
    model, made = make(config, dtype)
    published = [Published(config) for _ in SPECS]
    for step in range(8):
        set_gradients(model, ParallelContext.single(), gradients(step, scale))
        if step == 6:
            next(model.parameters()).main_grad.view(-1)[3] = math.nan
        expected = [one(p.main_grad.clone()) for one, p in zip(published, model.parameters(), strict=True)]
        made.apply()
        for theirs, parameter in zip(expected, model.parameters(), strict=True):
            assert same(parameter.main_grad, theirs), step
    assert made.updates == 8 and made.kept.shape == (filter_rows(config), 48 + 72 + 6)


def test_nothing_to_train_is_nothing_to_filter() -> None:
    empty = make_filter(MA, [])
    assert empty is not None and empty.entries() == []
    empty.apply()
    assert make_filter(OptimizerConfig(), []) is None and filter_rows(OptimizerConfig()) == 0


def test_a_checkpoint_of_another_filter_is_refused() -> None:
    _, ema = make(EMA)
    _, ma = make(MA)
    with pytest.raises(UserError, match=r"--grokfast ma.* --grokfast-window, or add --no-load-optim"):
        ma.load_state(ema.state())
    with pytest.raises(UserError, match="keeps 3 tensors"):
        make(OptimizerConfig(grokfast="ma", grokfast_window=4))[1].load_state(ma.state())


class Watch(Callback):
    """Recomputes by the published code what the filter makes of every gradient of this rank."""

    def __init__(self, trainer: Trainer, poison: dict[int, float]) -> None:
        self.poison, self.filtered = poison, list[list[Tensor]]()
        self.metrics: list[dict[str, float]] = []
        assert trainer.engine.filter is not None
        self.filter = trainer.engine.filter
        self.published = [Published(trainer.config.optimizer) for _ in self.filter.parameters]
        self.scale, self.raw = 1.0, list[Tensor]()

    def on_gradients(self, trainer: Trainer) -> None:
        bad = self.poison.get(trainer.iteration + 1)
        if bad is not None and trainer.ctx.world.rank == 0:
            next(main.grad for main in self.filter.parameters if main.master.numel()).view(-1)[0] = bad
        self.scale = 1 / trainer.scaler.scale
        self.raw = [main.grad * self.scale for main in self.filter.parameters]

    def on_update(self, trainer: Trainer) -> None:
        self.filtered.append([main.grad.clone() for main in self.filter.parameters])
        for one, raw, ours in zip(self.published, self.raw, self.filtered[-1], strict=True):
            assert same(ours, one(raw)), trainer.iteration

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.metrics.append(metrics.values())


def train(
    argv: list[str], poison: dict[int, float] | None = None
) -> tuple[dict[str, Tensor], int, list[dict[str, float]]]:
    """Trains as one of the ranks, watched; the weights of this rank, the updates that the filter has seen, and what a
    run from its beginning records."""
    trainer = trainer_of(argv) if torch.distributed.is_initialized() else make_trainer(argv)
    watch = Watch(trainer, poison or {})
    # Measuring how fast the machine is takes long. What was filtered before a checkpoint the formula has not seen.
    kept = [callback for callback in trainer.callbacks if isinstance(callback, Checkpointing | ExitInterval)]
    trainer.callbacks = [watch, *kept] if trainer.iteration == 0 else kept
    trainer.train()
    assert trainer.engine.filter is not None
    return weights(trainer), trainer.engine.filter.updates, watch.metrics


@pytest.mark.parametrize(("kind", "layout"), [("ema", ("--zero", "1", "--pp", "2")), ("ma", ("--zero", "2"))])
def test_at_any_layout_by_the_formula_and_resumed_bit_for_bit(
    ranks: RankPool, tmp_path: Path, kind: str, layout: tuple[str, ...]
) -> None:
    """The formula is checked on every rank at every step; a checkpoint goes on with the same bits, and at one rank
    with the same numbers."""
    prefix = write_dataset(tmp_path / "train_text_document")
    world = 4 if "--pp" in layout else 2
    more = ("--fp64", "--clip-grad", "0", "--micro-batch-size", "1", "--ddp-bucket-size", "3000", "--train-iters", "5")
    line = arguments(prefix, *more, *FLAGS[kind])
    whole = ranks.run(world, train, [*line, *layout])
    save = str(tmp_path / "run")
    stopped = ranks.run(world, train, [*line, *layout, "--save", save, "--exit-interval", "4"])
    resumed = ranks.run(world, train, [*line, *layout, "--load", f"{save}/step_0000004"])
    alone = train(line)
    elsewhere = train([*line, "--load", f"{save}/step_0000004"])
    assert [updates for _, updates, _ in (*whole, *stopped, *resumed, alone, elsewhere)] == (
        [5] * world + [4] * world + [5] * world + [5, 5]
    )
    for (expected, *_), (found, *_) in zip(whole, resumed, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    for name, tensor in alone[0].items():
        torch.testing.assert_close(elsewhere[0][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["ema", "ma"])
def test_an_update_that_is_left_out_does_not_enter(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    scaling = ("--fp16", "--initial-loss-scale", "4", "--hysteresis", "1", "--zero", "1", "--micro-batch-size", "1")
    line = arguments(prefix, *scaling, "--clip-grad", "0", "--clip-grad-value", "1e30", *FLAGS[kind])
    # The first is not a number of fp32; the second one is, but its filtered form is not.
    for _, updates, steps in ranks.run(2, train, line, {2: math.inf, 4: 3e38}):
        assert updates == 4
        assert [step["skipped"] for step in steps] == [0, 1, 0, 1, 0, 0]
        assert [math.isfinite(step["grad_norm"]) for step in steps] == [True, False, True, False, True, True]
        assert [step["unfiltered_grad_norm"] for step in steps[1:4:2]] == pytest.approx([math.inf, 1.5e38])
        assert all((step["clamped"] > 0) == step["skipped"] for step in steps), "recorded in every step"


@pytest.mark.parametrize("kind", ["ema", "ma"])
def test_what_a_filter_bears_it_keeps_finite(kind: str) -> None:
    config = OptimizerConfig(grokfast=kind)
    model, made = make(config)
    low, high = 1e30, 3.4e38  # the largest norm that is borne
    for _ in range(200):
        low, high = (middle, high) if made.bears(middle := (low + high) / 2) else (low, middle)
    for _ in range(config.grokfast_window + 1):
        signs = {name: gradient.sign() for name, gradient in gradients(0).items()}
        set_gradients(model, ParallelContext.single(), {name: low * sign for name, sign in signs.items()})
        made.apply()
        assert all(parameter.main_grad.isfinite().all() for parameter in model.parameters())
        assert made.kept.isfinite().all()
    assert not made.bears(high * 1.01) and not made.bears(math.inf) and not made.bears(math.nan)


def test_clipping_is_of_the_filtered_gradient(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    trainer = make_trainer(arguments(prefix, "--train-iters", "1", "--grokfast", "ema", "--clip-grad", "0.01"))
    steps: list[Any] = []
    trainer.callbacks = [mock.Mock(spec=Callback, on_step_end=lambda _, metrics: steps.append(metrics.values()))]
    trainer.train()
    [step] = steps
    assert step["grad_norm"] == pytest.approx(3 * step["unfiltered_grad_norm"], rel=1e-6) and step["clipped"] == 1
    squares = sum(float(main.grad.double().square().sum()) for main in trainer.optimizer.main.trained)
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-5)


def test_switched_on_off_or_renewed_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, save = write_dataset(tmp_path / "train_text_document"), str(tmp_path / "run")
    make_trainer(arguments(prefix, "--train-iters", "2", "--grokfast", "ema", "--save", save)).train()
    line = arguments(prefix, "--load", save)
    with pytest.raises(UserError, match="--grokfast ma"):
        make_trainer([*line, *WINDOW])
    for more, updates, told in (
        (("--grokfast", "ema"), 2, ""),
        ((*WINDOW, "--no-load-optim"), 0, "moments and loss scale start afresh"),
        ((), None, "what it keeps as gradient_filter is not part of this run"),
    ):
        made = make_trainer([*line, *more]).engine.filter
        assert (None if made is None else made.updates) == updates
        assert told in "".join(capsys.readouterr())


@pytest.mark.parametrize("flags", ["", "--pp 2 --bf16 --zero 1 --ep 2", "--pp 2 --zero 2 --vpp 2"])
def test_plans_count_what_is_kept(flags: str) -> None:
    """In a dry run, which makes the real filter; and a window of three gradients is three times one."""
    batch = ("--global-batch-size", "16", "--micro-batch-size", "1", "--seq-length", "256")
    given = ("--config", "cdrmix-test", "--vocab-size", "500", *batch, "--hidden-size", "256", "--rwkv-init", "normal")
    planned = []
    for filtered in ((), FLAGS["ema"], FLAGS["ma"]):
        _, ranks = try_ranks(make_config([*given, *filtered, *flags.split()]), 8)
        assert all(rank.state == rank.planned for rank in ranks)
        planned.append(ranks[0].planned.optimizer)
    none, one, three = planned
    assert three - none == 3 * (one - none) > 0
