"""The plateau schedule is torch's ReduceLROnPlateau."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.training.lr_plateau import ReduceOnPlateau


@pytest.mark.parametrize("patience", [0, 2])
def test_rates_are_torchs(patience: int) -> None:
    config = OptimizerConfig(
        lr=1.0, min_lr=0.1, lr_plateau_factor=0.4, lr_plateau_patience=patience, lr_plateau_threshold=0.01
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.4, patience=patience, threshold=0.01, min_lr=0.1, eps=0.0
    )
    ours, trainer = ReduceOnPlateau(config), SimpleNamespace(lr_factors={})
    losses = [3.0, 2.5, 2.5, 2.49, 2.48, 2.47, float("nan"), 2.3, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4]
    seen = []
    for number, loss in enumerate(losses, 1):
        theirs.step(loss)
        if number == 5:  # from a checkpoint
            kept, ours = ours.state(), ReduceOnPlateau(config)
            ours.load_state(kept)
        metrics: Any = SimpleNamespace(loss=loss, iteration=number)
        ours.on_evaluate(trainer, metrics)  # type: ignore[arg-type]
        seen.append(trainer.lr_factors.get("plateau", 1.0))
        assert seen[-1] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), number
    assert seen[-1] == 0.1 and len(set(seen)) > 2
