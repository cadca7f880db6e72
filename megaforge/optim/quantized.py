"""SGD and Adam for quantized training: of matrices that are multiplied as codes, the weights between the codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.optim.adamw import AdamW
from megaforge.optim.main_parameters import MainParameter
from megaforge.optim.sgd import SGD
from megaforge.optim.update_rule import TorchRule
from megaforge.parallel.param_spec import ParamSpec


class LatentWeights(TorchRule):
    """What a rule does to latent weights w beside its update, where the product sees q(w).

    *Damping* (``--qat-damping``; Nagel et al., arXiv 2203.11086): weights near the border of two codes oscillate from
    one to the other. As much as weight decay pulls to zero, ``w -= lr * damping * (w - q(w))`` pulls to the code that a
    weight has now; one beyond the last code is not pulled.

    *Limit* (``--qat-latent-limit``; BinaryConnect, arXiv 1511.00363, section 2.4): a weight far beyond the last code
    changes nothing, and would take long to come back. It is kept within ``limit`` times the largest magnitude that the
    product sees.

    Both go by the weights and scales of the product that made the gradient.
    """

    @classmethod
    def takes(cls, spec: ParamSpec) -> bool:
        return spec.quantized

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = super().make(groups)  # type: ignore[safe-super]
        self.implementation += " on latent weights"
        return optimizer

    def step(self, lr: float, done: int) -> None:
        limits = [self._before(main, lr) for main in self.parameters]
        super().step(lr, done)
        for main, limit in zip(self.parameters, limits, strict=True):
            if limit is not None:
                main.master.detach().clamp_(-limit, limit)

    def _before(self, main: MainParameter, lr: float) -> Tensor | None:
        """Damps, and gives the limit."""
        limit, damping = self.config.qat_latent_limit, self.config.qat_damping
        if not limit and not damping:
            return None
        seen, largest = main.quantized()
        master = main.master.detach()
        if damping:
            within = master.clamp(-largest, largest)
            master.sub_(within - seen, alpha=lr * main.spec.lr_mult * damping)
        return largest * limit if limit else None


class QATAdam(LatentWeights, AdamW):
    """AdamW on the latent weights of quantized matrices, damped and kept within reach of their codes; the rest is
    `--optimizer adam`'s."""

    others = "adam"


class QATSGD(LatentWeights, SGD):
    """SGD on the latent weights of quantized matrices, damped and kept within reach of their codes; the rest is
    `--optimizer sgd`'s."""

    others = "sgd"
