"""``--l1-coeff`` and ``--l2-coeff``: penalties of weights, as a part of the loss that is minimised."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaforge.config.regularization_config import RegularizationConfig
from megaforge.optim.main_parameters import MainParameter


def add_penalty(config: RegularizationConfig, parameters: Sequence[MainParameter], scale: float) -> None:
    """Adds to reduced gradients those of ``l1 * sum |w| + l2 / 2 * sum w^2``, over weights that weight decay counts
    (matrices, not biases and norms). Each element by itself: the layout changes nothing.

    Args:
        parameters: all that this rank trains, under ZeRO its parts of them.
        scale: the loss scale that the gradients have.
    """
    if not (config.l1_coeff or config.l2_coeff):
        return
    with torch.no_grad():
        for main in parameters:
            if main.spec.weight_decay:
                if config.l1_coeff:
                    main.grad.add_(main.master.sign(), alpha=config.l1_coeff * scale)
                if config.l2_coeff:
                    main.grad.add_(main.master, alpha=config.l2_coeff * scale)
