"""SGD with momentum against its formula."""

from __future__ import annotations

import pytest
import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import Optimizer
from megaforge.parallel.context import ParallelContext
from tests.optim.small_model import SPECS, SmallModel, global_gradients, set_gradients


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_follow_the_formula(momentum: float) -> None:
    ctx, rates = ParallelContext.single(), (1e-2, 2e-2, 5e-3)
    config = OptimizerConfig(optimizer="sgd", sgd_momentum=momentum, weight_decay=0.1)
    model = SmallModel(ctx, torch.float64)
    optimizer = Optimizer(config, model, ctx)
    weights = {name: tensor.clone() for name, _, tensor in optimizer.weight_entries()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for step, rate in enumerate(rates):
        gradients = global_gradients(step)
        set_gradients(model, ctx, gradients)
        optimizer.step(rate)
        for spec in SPECS:
            decay = 0.1 if spec.weight_decay else 0.0
            velocity[spec.name] = momentum * velocity[spec.name] + gradients[spec.name] + decay * weights[spec.name]
            weights[spec.name] = weights[spec.name] - rate * spec.lr_mult * velocity[spec.name]
    for name, _, tensor in optimizer.weight_entries():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-13, atol=1e-14)
    kept = [name for name, _, _ in optimizer.state_entries()]
    assert kept == [f"optimizer.momentum_buffer.{spec.name}" for spec in SPECS] * bool(momentum)
    assert optimizer.implementation == "torch SGD"
