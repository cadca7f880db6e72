"""Initial weights: a function of (seed, global parameter name, element block), the same at every layout."""

from __future__ import annotations

import torch
from torch import nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs


@torch.no_grad()
def initialize_parameters(module: nn.Module, ctx: ParallelContext, seed: int) -> None:
    """Fills every parameter of ``module`` by its declared rule; draws in float64 and rounds once to its dtype."""
    for spec, parameter in named_specs(module):
        for piece in spec.pieces(ctx):
            values = spec.init.fill(seed, spec.name, spec.shape, piece.global_box)
            piece.local_view(parameter).copy_(values)
