"""The plateau schedule is torch's ReduceLROnPlateau."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.lr_plateau import ReduceOnPlateau


def run_of(config: OptimizerConfig) -> Any:
    return SimpleNamespace(lr_factors={}, config=SimpleNamespace(optimizer=config))


def factor_of(callback: ReduceOnPlateau, trainer: Any) -> float:
    """Of the next step; between steps there is none."""
    callback.on_step_start(trainer)
    factor: float = trainer.lr_factors["plateau"]
    callback.on_step_end(trainer, trainer)
    assert trainer.lr_factors == {}
    return factor


@pytest.mark.parametrize("patience", [0, 2])
def test_rates_are_torchs(patience: int) -> None:
    config = OptimizerConfig(
        lr=1.0, min_lr=0.1, lr_plateau_factor=0.4, lr_plateau_patience=patience, lr_plateau_threshold=0.01
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.4, patience=patience, threshold=0.01, min_lr=0.1, eps=0.0
    )
    ours, trainer = ReduceOnPlateau(), run_of(config)
    losses = [
        float("nan"),
        3.0,
        2.5,
        2.5,
        2.49,
        2.48,
        2.47,
        float("nan"),
        2.3,
        2.4,
        2.4,
        2.4,
        2.4,
        2.4,
        2.4,
        2.4,
        2.4,
        2.4,
    ]
    seen = []
    for number, loss in enumerate(losses, 1):
        theirs.step(loss)
        if number == 5:  # from a checkpoint
            kept, ours = ours.state(), ReduceOnPlateau()
            ours.load_state(kept)
        metrics: Any = SimpleNamespace(loss=loss, iteration=number, due=True)
        ours.on_evaluate(trainer, metrics)
        seen.append(factor_of(ours, trainer))
        assert seen[-1] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), number
    assert seen[-1] == 0.1 and len(set(seen)) > 2


def test_an_evaluation_where_a_run_stops_does_not_count() -> None:
    ours, trainer = ReduceOnPlateau(), run_of(OptimizerConfig(lr_plateau_patience=0))
    for iteration, factor in ((10, 1.0), (15, 1.0), (20, 0.5), (21, 0.5)):
        metrics: Any = SimpleNamespace(loss=2.0, iteration=iteration, due=iteration % 10 == 0)
        ours.on_evaluate(trainer, metrics)
        assert factor_of(ours, trainer) == factor, iteration
