"""AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.update_rule import TorchRule


class AdamW(TorchRule):
    """Adam with decoupled weight decay: NVIDIA apex's on CUDA where it is installed, else torch's fused one.

    With ``--no-decoupled-weight-decay`` the decay is part of the gradient: Adam (Kingma & Ba, arXiv 1412.6980) with L2.
    """

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def arguments(self) -> dict[str, Any]:
        """What every implementation is told."""
        config = self.config
        return {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        arguments = self.arguments()
        masters = [main.master for main in self.parameters]
        wide = any(master.dtype == torch.float64 for master in masters)
        fused_adam = _nvidia_fused_adam() if _on_cuda(masters) and not wide else None
        if fused_adam is not None:
            self.implementation = "NVIDIA apex FusedAdam"
            return fused_adam(groups, adam_w_mode=self.config.decoupled_weight_decay, **arguments)
        if not self.config.decoupled_weight_decay:
            self.implementation = "torch fused Adam"
            return torch.optim.Adam(groups, fused=True, **arguments)
        self.implementation = "torch fused AdamW"
        return torch.optim.AdamW(groups, fused=True, **arguments)


def _on_cuda(masters: list[torch.nn.Parameter]) -> bool:
    return all(master.device.type == "cuda" for master in masters)


def _nvidia_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam (github.com/NVIDIA/apex) when it is installed with its CUDA extension.

    The package called apex on PyPI is another product: it has no ``apex.optimizers`` and brings no ``amp_C``.
    """
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("amp_C") is None:
        return None
    try:
        return getattr(importlib.import_module("apex.optimizers"), "FusedAdam", None)
    except ImportError:
        return None
