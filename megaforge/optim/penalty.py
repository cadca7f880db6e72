"""``--l1-coeff`` and ``--l2-coeff``: penalties of weights, as a part of the loss that is minimised."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaforge.config.regularization_config import RegularizationConfig
from megaforge.optim.clip import sum_of_squares
from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.optim.norms import summed
from megaforge.parallel.context import ParallelContext


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


def penalties(config: RegularizationConfig, main: MainParameters, ctx: ParallelContext) -> dict[str, float]:
    """What :func:`add_penalty` adds the gradients of, by name and before their coefficients: ``sum |w|`` and
    ``sum w^2 / 2`` of the whole model's weights as they are now; those that no flag asks for are left out.
    Collective."""
    found: dict[str, float] = {}
    if config.l1_coeff:
        found["l1_penalty"] = summed(main, ctx, lambda one: _counted(one, lambda w: w.abs().sum(dtype=torch.float64)))
    if config.l2_coeff:
        found["l2_penalty"] = summed(main, ctx, lambda one: _counted(one, lambda w: sum_of_squares([w]))) / 2
    return found


def _counted(main: MainParameter, number: Callable[[Tensor], Tensor]) -> Tensor:
    weight = main.master.detach()
    return number(weight) if main.spec.weight_decay else weight.new_zeros((), dtype=torch.float64)
