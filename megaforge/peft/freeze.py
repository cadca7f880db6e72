"""A frozen model: what a run leaves as it is."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from megaforge.parallel.param_spec import declare, spec_of


def freeze(parameter: nn.Parameter) -> None:
    """``parameter`` gets no gradient, and nothing updates it."""
    parameter.requires_grad_(False)
    declare(parameter, replace(spec_of(parameter), frozen=True))


def freeze_all(model: nn.Module) -> None:
    """Every parameter of ``model``."""
    for parameter in model.parameters():
        freeze(parameter)


def thaw(parameter: nn.Parameter) -> None:
    """The opposite."""
    parameter.requires_grad_(True)
    declare(parameter, replace(spec_of(parameter), frozen=False))
