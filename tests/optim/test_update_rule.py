"""What holds for every update rule that is registered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import Optimizer
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs
from megaforge.registry import UPDATE_RULES
from tests.optim.small_model import SmallModel


def matrices(dtype: torch.dtype = torch.float64) -> SmallModel:
    model = SmallModel(ParallelContext.single(), dtype)
    for spec, parameter in list(named_specs(model)):
        if len(spec.shape) == 2:
            parameter.spec = replace(spec, role="matrix", update="matrix")
    return model


@pytest.mark.parametrize("rule", UPDATE_RULES.names())
def test_without_gradient_weights_move_by_their_decay_alone(rule: str) -> None:
    model = matrices()
    optimizer = Optimizer(OptimizerConfig(optimizer=rule, weight_decay=0.5), model, ParallelContext.single())
    before = {name: tensor.clone() for name, _, tensor in optimizer.weight_entries()}
    optimizer.decay_factor = 0.0
    optimizer.step(0.1)
    for name, _, tensor in optimizer.weight_entries():
        assert torch.equal(tensor, before[name]), name
    optimizer.decay_factor = 0.5
    optimizer.step(0.1)
    for name, spec, tensor in optimizer.weight_entries():
        shrinks = 1 - 0.1 * spec.lr_mult * 0.25 if spec.weight_decay else 1.0
        torch.testing.assert_close(tensor, before[name] * shrinks, rtol=1e-12, atol=0, msg=name)
