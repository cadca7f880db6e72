from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.length_config import LengthConfig
from megaforge.config.lr_shapes import RateShape
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.optim import LearningRateSchedule
from megaforge.registry import LR_SCHEDULES

CONFIG = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10)


def schedule(style: str, train_iters: int = 110, **changes: object) -> LearningRateSchedule:
    return LearningRateSchedule(dataclasses.replace(CONFIG, lr_decay_style=style, **changes), train_iters)


@pytest.mark.parametrize("style", LR_SCHEDULES.names())
def test_warm_up_rises_by_equal_steps_to_the_peak(style: str) -> None:
    rates = schedule(style)
    assert [rates(i) for i in range(1, 11)] == pytest.approx([i / 10 for i in range(1, 11)], abs=1e-15)
    assert rates(11) <= 1.0
    raised = schedule(style, lr_warmup_init=0.5)
    assert [raised(i) for i in (1, 5, 10)] == pytest.approx([0.55, 0.75, 1.0], abs=1e-15)
    shares = schedule(style, lr_warmup_iters=0, lr_warmup_fraction=0.095)  # of 110: 10.45 iterations
    assert shares(10) == pytest.approx(10 / 10.45, abs=1e-15) and shares(11) <= 1.0
    assert shares(11) == LR_SCHEDULES.get(style).rate(shares.settings, 11)


def test_closed_forms() -> None:
    cosine, linear, constant = schedule("cosine"), schedule("linear"), schedule("constant")
    for iteration in range(11, 111):
        progress = (iteration - 10) / 100
        assert cosine(iteration) == pytest.approx(0.1 + 0.9 * math.cos(math.pi / 2 * progress) ** 2, abs=1e-14)
        assert linear(iteration) == pytest.approx(1.0 - 0.9 * progress, abs=1e-14)
        assert constant(iteration) == 1.0
    assert cosine(60) == pytest.approx(0.55)


def test_wsd_is_flat_until_its_decay() -> None:
    rates = schedule("WSD", lr_wsd_decay_iters=20)
    assert {rates(iteration) for iteration in range(10, 91)} == {1.0}
    for iteration in range(91, 111):
        assert rates(iteration) == pytest.approx(0.1 + 0.9 * (1 - ((iteration - 90) / 20) ** 0.5), abs=1e-14)
    assert [schedule("WSD")(iteration) < 1.0 for iteration in (99, 100)] == [False, True]  # a tenth of 110 by default


@pytest.mark.parametrize("name", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_wsd_decays_as_megatron_does(name: str) -> None:
    rates = schedule("WSD", lr_wsd_decay_iters=20, lr_wsd_decay_style=name)
    for iteration in range(91, 111):
        share = (iteration - 90) / 20
        left = {
            "exponential": 2 * math.pow(0.5, share) - 1,
            "linear": 1 - share,
            "cosine": (math.cos(math.pi * share) + 1) / 2,
            "minus_sqrt": 1 - math.sqrt(share),
        }[name]
        assert rates(iteration) == pytest.approx(0.1 + 0.9 * left, abs=1e-14)


@pytest.mark.parametrize("mult", [1, 2])
def test_restarts_are_torchs(mult: int) -> None:
    rates = schedule("cosine-restarts", lr_warmup_iters=0, lr_restart_iters=15, lr_restart_mult=float(mult))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 15, mult, eta_min=0.1)
    ends, length = set[int](), 15
    while max(ends, default=0) < 110:
        ends.add(max(ends, default=0) + length)
        length *= mult
    for iteration in range(1, 110):
        theirs.step()
        # The last step of a cycle is at the floor; torch's next cycle begins there already.
        expected = 0.1 if iteration in ends else theirs.get_last_lr()[0]
        assert rates(iteration) == pytest.approx(expected, abs=1e-13), iteration
    assert rates(110) == rates(500) == 0.1
    warm = schedule("cosine-restarts", lr_restart_iters=15)
    assert [warm(i + 10) for i in (1, 15, 16)] == pytest.approx([rates(1), 0.1, rates(1)], abs=1e-14)


def test_inverse_square_root_falls_from_the_warm_up_on() -> None:
    rates = schedule("inverse-square-root", lr_decay_iters=2000)
    assert rates(10) == 1.0
    assert [rates(i) for i in (40, 90, 160)] == pytest.approx([1 / 2, 1 / 3, 1 / 4], abs=1e-15)
    assert rates(1001) == rates(2000) == rates(2001) == 0.1
    assert schedule("inverse-square-root", min_lr=0.0)(111) == 0.0
    assert schedule("inverse-square-root", lr_warmup_iters=0)(1) == 1.0


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD", "cosine-restarts"])
def test_the_floor_is_reached_with_the_last_iteration_and_kept(style: str) -> None:
    rates = schedule(style)
    assert rates(109) > 0.1
    assert rates(110) == rates(111) == rates(10_000) == 0.1
    early = schedule(style, lr_decay_iters=60, lr_wsd_decay_iters=5)
    assert early(59) > 0.1 and early(60) == 0.1


def test_a_run_may_end_within_its_warm_up() -> None:
    rates = schedule("cosine", train_iters=5)
    assert [rates(i) for i in (1, 5, 10, 11)] == [0.1, 0.5, 1.0, 0.1]


def test_no_warm_up_starts_near_the_peak() -> None:
    rates = schedule("linear", lr_warmup_iters=0, train_iters=100)
    assert rates(1) == pytest.approx(1 - 0.9 / 100)
    with pytest.raises(ValueError, match="count from 1"):
        rates(0)


def test_digest_changes_with_the_rates_only() -> None:
    assert schedule("cosine").digest == schedule("cosine", weight_decay=0.5, lr_wsd_decay_iters=3).digest
    assert schedule("constant").digest == schedule("constant", train_iters=500).digest
    different = [schedule("cosine"), schedule("linear"), schedule("WSD"), schedule("cosine", train_iters=111)]
    different += [schedule("cosine", lr=2.0), schedule("cosine", min_lr=0.0), schedule("cosine", lr_warmup_iters=9)]
    different += [schedule("WSD", lr_wsd_decay_iters=12), schedule("WSD", lr_wsd_decay_style="linear")]
    different += [schedule("cosine", lr_warmup_init=0.2), schedule("inverse-square-root")]
    different += [schedule("cosine-restarts", lr_restart_iters=20), schedule("cosine-restarts", lr_restart_iters=30)]
    assert len({one.digest for one in different}) == len(different)


def test_digests_of_former_checkpoints_stay() -> None:
    facts = ["cosine", 1.0, 10, 0.1, 110]
    assert schedule("cosine").digest == hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    assert schedule("constant").digest == hashlib.sha256(json.dumps(["constant", 1.0, 10]).encode()).hexdigest()
    assert schedule("WSD").digest == hashlib.sha256(json.dumps(["WSD", *facts[1:], 11]).encode()).hexdigest()


def test_a_shape_reads_what_there_is() -> None:
    with pytest.raises(UserError, match="reads 'lr_decay_iter', .*did you mean lr_decay_iters"):
        RateShape(lambda s, step: s.lr, "one", reads=("lr_decay_iter",))


class Batches:
    """Samples of an iteration as batches count them."""

    def __init__(self, batches: BatchSchedule) -> None:
        self.batches = batches

    def at(self, iteration: int) -> tuple[int, int]:
        return 0, self.batches.samples_after(iteration)

    def first_at(self, tokens: Fraction | int = 0, samples: int = 0) -> int:
        return self.batches.steps_until(samples)


def in_samples(batches: BatchSchedule, length: LengthConfig, **changes: object) -> LearningRateSchedule:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear", **changes)
    return LearningRateSchedule(config, 10, length, Batches(batches))


def test_lengths_in_samples_need_not_be_whole_steps() -> None:
    """Llama 3's line: 3906252 samples of warm-up are 30517.59 batches of 128."""
    length = LengthConfig(train_samples=1953125000, lr_decay_samples=1949218748, lr_warmup_samples=3906252)
    rates = in_samples(BatchSchedule(128), length)
    assert rates(30517) == pytest.approx(30517 * 128 / 3906252, rel=1e-15) and rates(30517) < 1
    left = (1949218748 - 30518 * 128) / (1949218748 - 3906252)
    assert rates(30518) == pytest.approx(0.1 + 0.9 * left, rel=1e-15)
    assert rates(15228272) == 0.1 < rates(15228271) and {30517, 15228271} < rates.corners
    whole = in_samples(BatchSchedule(4), LengthConfig(train_samples=440, lr_warmup_samples=40))
    plain = schedule("linear")
    assert [whole(k) for k in range(1, 120)] == pytest.approx([plain(k) for k in range(1, 120)], rel=1e-14)
    assert whole.digest != plain.digest and whole.facts["unit"] == "samples"


def test_batches_that_grow_stretch_it() -> None:
    """A step of twice the samples goes twice as far."""
    length = LengthConfig(train_samples=100)
    rates = in_samples(BatchSchedule(20, steps=((0, 10), (40, 20))), length, lr_warmup_fraction=0.25)
    assert [rates(k) for k in (1, 2)] == pytest.approx([0.4, 0.8])
    assert [rates(k) for k in (3, 4, 5, 6)] == pytest.approx([0.1 + 0.9 * (100 - s) / 75 for s in (30, 40, 60, 80)])
    assert rates(7) == 0.1 and rates.between(3.0, 0.0)(6) == pytest.approx(3 * 20 / 75)
    assert rates.between(3.0, 0.0)(2) == pytest.approx(2.4), "the same warm-up to another peak"


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        ({"lr_warmup_samples": 9}, {}),
        ({"train_samples": 99}, {"lr_warmup_iters": 3}),
        ({"train_samples": 99}, {"lr_decay_iters": 30}),
        ({"train_samples": 99, "lr_warmup_epochs": 0.1}, {}),
    ],
)
def test_mixed_lengths_are_counted_in_iterations(length: dict[str, Any], changes: dict[str, int]) -> None:
    assert in_samples(BatchSchedule(4), LengthConfig(**length), **changes).settings.unit == "iterations"
