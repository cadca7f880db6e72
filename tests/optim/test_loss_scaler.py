from __future__ import annotations

import json

from megaforge.config.run_config import OptimizerConfig
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


def test_backoff_after_overflows_in_a_row_down_to_the_floor() -> None:
    assert scales(LossScaler(CONFIG, enabled=True), "xxxxxx") == [16, 8, 4, 2, 2, 2]
    assert scales(LossScaler(CONFIG, enabled=True), "x.x.xx.x") == [16, 16, 16, 16, 16, 8, 8, 8]


def test_state_continues() -> None:
    whole, first, second = (LossScaler(CONFIG, enabled=True) for _ in range(3))
    expected = scales(whole, "..x..xx....")
    begin = scales(first, "..x..x")
    second.load_state(json.loads(json.dumps(first.state())))
    assert begin + scales(second, "x....") == expected


def test_a_run_without_scaling_keeps_one() -> None:
    scaler = LossScaler(CONFIG, enabled=False)
    assert scales(scaler, "....xx") == [1.0] * 6
    scaler.load_state({"scale": 512.0, "clean_steps": 1, "overflows": 0})
    assert scaler.scale == 1.0
