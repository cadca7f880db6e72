"""A model of three parameters with every kind of declaration, and gradients that any layout can slice."""

from __future__ import annotations

import torch
from torch import nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.param_spec import ParamSpec, make_parameter, named_specs

SPECS = (
    ParamSpec("column.weight", (8, 6), Normal(1.0), shard_dim=0, parts=(4, 4)),
    ParamSpec("row.weight", (6, 12), Normal(1.0), shard_dim=1, lr_mult=2.0),
    ParamSpec("mix", (6,), Normal(1.0), tp_partial_grad=True, weight_decay=False, keep_fp32=True),
)


class SmallModel(nn.Module):
    """Initialised from seed 0, with ``main_grad`` of every parameter zero."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.declared = nn.ParameterList([make_parameter(spec, ctx, dtype) for spec in SPECS])
        initialize_parameters(self, ctx, seed=0)
        set_gradients(self, ctx, {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in SPECS})


def global_gradients(seed: int) -> dict[str, torch.Tensor]:
    """Gradients of the unsharded model, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for spec in SPECS}


def set_gradients(model: nn.Module, ctx: ParallelContext, gradients: dict[str, torch.Tensor]) -> None:
    """Gives each parameter its share of the global ``gradients`` as a reduced ``main_grad``."""
    for spec, parameter in named_specs(model):
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        parameter.main_grad = spec.take_local(gradients[spec.name], ctx).to(wide)
