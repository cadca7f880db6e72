from __future__ import annotations

import dataclasses
import math

import pytest

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import LearningRateSchedule

CONFIG = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10)


def schedule(style: str, train_iters: int = 110, **changes: object) -> LearningRateSchedule:
    return LearningRateSchedule(dataclasses.replace(CONFIG, lr_decay_style=style, **changes), train_iters)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "WSD"])
def test_warm_up_rises_by_equal_steps_to_the_peak(style: str) -> None:
    rates = schedule(style)
    assert [rates(i) for i in range(1, 11)] == pytest.approx([i / 10 for i in range(1, 11)], abs=1e-15)
    assert rates(11) <= 1.0


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


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
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
    different += [schedule("WSD", lr_wsd_decay_iters=12)]
    assert len({one.digest for one in different}) == len(different)
