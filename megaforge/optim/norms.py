"""Numbers of the whole model, the same on every rank of every layout: each element is counted once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.optim.clip import sum_of_squares
from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard


def parameter_norm(main: MainParameters, ctx: ParallelContext) -> float:
    """The 2-norm of all trained weights, of their masters where there are some. Collective."""
    return math.sqrt(summed(main, ctx, lambda one: sum_of_squares([one.master.detach()])))


def zeros_in_gradient(main: MainParameters, ctx: ParallelContext) -> float:
    """How many elements of the reduced gradient are 0. Collective."""
    return summed(main, ctx, lambda one: (one.grad == 0).sum())


@torch.no_grad()
def summed(main: MainParameters, ctx: ParallelContext, number: Callable[[MainParameter], Tensor]) -> float:
    """``number`` of all that is trained, each element counted once. Collective."""
    total = torch.zeros((), dtype=torch.float64, device=ctx.device)
    for one in main.trained:
        if optimizer_shard(one.parameter).is_first_copy(ctx):
            total += number(one)
    if ctx.world.size > 1:
        dist.all_reduce(total, group=ctx.world.group)
    return float(total)
