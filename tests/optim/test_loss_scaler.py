from __future__ import annotations

import dataclasses
import json
import random

import pytest

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import LossScaler

CONFIG = OptimizerConfig(initial_loss_scale=16.0, min_loss_scale=2.0, loss_scale_window=3, hysteresis=2)


def scales(scaler: LossScaler, outcomes: str) -> list[float]:
    """The scale after each step; ``.`` is a clean step and ``x`` an overflow."""
    seen = []
    for outcome in outcomes:
        scaler.update(outcome == ".")
        seen.append(scaler.scale)
    return seen


def test_growth_after_a_window_of_clean_steps_in_a_row() -> None:
    assert scales(LossScaler(CONFIG, enabled=True), ".......") == [16, 16, 32, 32, 32, 64, 64]
    assert scales(LossScaler(CONFIG, enabled=True), "..x...") == [16, 16, 16, 16, 16, 32]


def test_overflows_count_until_the_scale_grows_and_stop_at_the_floor() -> None:
    assert scales(LossScaler(CONFIG, enabled=True), "xxxxxx") == [16, 8, 4, 2, 2, 2]
    assert scales(LossScaler(CONFIG, enabled=True), "x.x.xx.x") == [16, 16, 8, 8, 4, 2, 2, 2]
    assert scales(LossScaler(CONFIG, enabled=True), "x...x.x") == [16, 16, 16, 32, 32, 32, 16]


def test_every_second_gradient_too_large() -> None:
    """Seven steps are left out until the scale fits, and none of the later ones."""
    config = OptimizerConfig(initial_loss_scale=65536.0, loss_scale_window=1000, hysteresis=2)
    scaler, left_out = LossScaler(config, enabled=True), 0
    for step in range(900):
        finite = step % 2 == 0 or scaler.scale <= 1024
        scaler.update(finite)
        left_out += not finite
    assert (left_out, scaler.scale) == (7, 1024.0)


def test_any_outcomes_as_megatron() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        config = OptimizerConfig(
            initial_loss_scale=2.0 ** draw.randint(0, 20),
            min_loss_scale=1.0,
            loss_scale_window=draw.randint(1, 5),
            hysteresis=draw.randint(1, 4),
        )
        outcomes = "".join(draw.choices(".x", weights=(draw.choice((1, 3, 9)), 1), k=200))
        assert scales(LossScaler(config, enabled=True), outcomes) == _megatron(config, outcomes)


def _megatron(config: OptimizerConfig, outcomes: str) -> list[float]:
    """``DynamicGradScaler.update`` of Megatron-LM's core/optimizer/grad_scaler.py, step by step."""
    scale, growth, hysteresis, seen = config.initial_loss_scale, 0, config.hysteresis, []
    for outcome in outcomes:
        if outcome == "x":
            growth = 0
            hysteresis -= 1
            if hysteresis <= 0:
                scale = max(scale * 0.5, config.min_loss_scale)
        else:
            growth += 1
            if growth == config.loss_scale_window:
                growth, hysteresis = 0, config.hysteresis
                scale = min(scale * 2.0, 2.0**127)  # theirs has no bound
        seen.append(scale)
    return seen


def test_the_scale_stays_within_fp32() -> None:
    config = OptimizerConfig(initial_loss_scale=2.0**126, loss_scale_window=1)
    assert scales(LossScaler(config, enabled=True), "...") == [2.0**127] * 3


def test_state_continues() -> None:
    whole, first, second = (LossScaler(CONFIG, enabled=True) for _ in range(3))
    expected = scales(whole, "..x..xx....")
    begin = scales(first, "..x..x")
    second.load_state(json.loads(json.dumps(first.state())))
    assert begin + scales(second, "x....") == expected


def test_a_shorter_window_and_a_higher_floor_hold_at_once() -> None:
    before = LossScaler(CONFIG, enabled=True)
    scales(before, "..")
    after = LossScaler(dataclasses.replace(CONFIG, loss_scale_window=1, min_loss_scale=64.0), enabled=True)
    after.load_state(before.state())
    assert scales(after, ".x") == [128, 128]


def test_a_run_without_scaling_keeps_one() -> None:
    scaler = LossScaler(CONFIG, enabled=False)
    assert scales(scaler, "....xx") == [1.0] * 6
    scaler.load_state({"scale": 512.0, "clean_steps": 1, "overflows": 0})
    assert scaler.scale == 1.0


@pytest.mark.parametrize(
    "state", [LossScaler(CONFIG, enabled=False).state(), {"scale": 1.0, "clean_steps": 0, "overflows": 0}]
)
def test_after_a_run_without_scaling_it_starts_at_the_initial_scale(state: dict[str, float]) -> None:
    scaler = LossScaler(CONFIG, enabled=True)
    scaler.load_state(json.loads(json.dumps(state)))
    assert scales(scaler, "...") == [16, 16, 32]


def test_a_fixed_scale_stays_and_bears_overflows_for_a_while() -> None:
    config = dataclasses.replace(CONFIG, loss_scale=1024.0)
    scaler = LossScaler(config, enabled=True)
    assert scales(scaler, "....x.x....") == [1024] * 11
    for overflows in range(20):
        assert scaler.can_fall == (overflows < 19), "the 20th in a row ends the run"
        scaler.update(False)
    scaler.load_state({"scale": 64.0, "clean_steps": 3, "overflows": 1})
    assert scaler.scale == 1024 and LossScaler(config, enabled=False).scale == 1
