"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013), as Megatron-LM's ``--optimizer sgd``."""

from __future__ import annotations

from typing import Any

import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.update_rule import TorchRule


class SGD(TorchRule):
    """``v = momentum * v + g + decay * w``, then ``w -= lr * v``; the decay is part of the gradient."""

    implementation = "torch SGD"

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("momentum_buffer",) if config.sgd_momentum else ()

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.config.lr, momentum=self.config.sgd_momentum)
