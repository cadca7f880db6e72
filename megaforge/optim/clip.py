"""The norm of the whole model's gradient, the same number on every rank of every layout, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.param_spec import KINDS, named_specs

# Squares are summed in fp64, block by block: a block of fp64 stays in a CPU's cache (4x the speed of one fp64 copy),
# while a GPU wants few and large ones.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
_KINDS = {kind: place for place, kind in enumerate(KINDS)}


@torch.no_grad()
def global_grad_norm(
    model: nn.Module,
    ctx: ParallelContext,
    by_kind: dict[str, float] | None = None,
    read: Callable[[Tensor], list[float]] = Tensor.tolist,
) -> float:
    """The 2-norm of all ``main_grad`` together, each element of the global model counted once: whole gradients on the
    first rank that has one, shares (ZeRO) on every rank of one copy.

    Gradients must be reduced already. A value that is not finite on any rank makes the norm inf or nan on all.

    Args:
        by_kind: takes the norm of each kind of parameter (``ParamSpec.kind``) that the model has.
        read: brings numbers (fp64 [n]) to the host: a step reads others with them, so that it waits once.
    """
    squares = torch.zeros(len(_KINDS), dtype=torch.float64, device=ctx.device)
    present = torch.zeros_like(squares)
    for spec, parameter in named_specs(model):
        if parameter.requires_grad:
            own = _sum_of_squares(parameter.main_grad)  # type: ignore[attr-defined]
            # Copies on other ranks are multiplied by 0 rather than left out: 0 x inf = nan reaches every rank.
            place = _KINDS.get(spec.kind, _KINDS["other"])
            squares[place] += own if optimizer_shard(parameter).is_first_copy(ctx) else own * 0.0
            present[place] = 1.0
    sums = torch.stack([squares, present])
    if ctx.world.size > 1:
        dist.all_reduce(sums, group=ctx.world.group)
    numbers = read(sums.flatten())
    values, holders = numbers[: len(_KINDS)], numbers[len(_KINDS) :]
    if by_kind is not None:  # other ranks hold what this one may not: a stage without the head has its norm too
        by_kind.update({kind: math.sqrt(values[place]) for kind, place in _KINDS.items() if holders[place]})
    return math.sqrt(sum(values))


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    ctx: ParallelContext,
    max_norm: float,
    loss_scale: float = 1.0,
    by_kind: dict[str, float] | None = None,
    read: Callable[[Tensor], list[float]] = Tensor.tolist,
) -> float:
    """Divides every ``main_grad`` by ``loss_scale``; scales them down where their global norm exceeds ``max_norm``.

    Args:
        max_norm: 0 measures the norm and clips nothing.
        loss_scale: the factor that the loss carried.
        by_kind, read: see :func:`global_grad_norm`.

    Returns:
        The global norm before clipping, without the loss scale; the same on every rank. When it is not finite the
        gradients are left as they are, and the step must be skipped.
    """
    norm = global_grad_norm(model, ctx, by_kind, read) / loss_scale
    if by_kind is not None:
        by_kind.update({kind: value / loss_scale for kind, value in by_kind.items()})
    if not math.isfinite(norm):
        return norm
    factor = 1 / loss_scale
    if max_norm and norm > max_norm:
        factor *= max_norm / norm
    if factor != 1:
        for _, parameter in named_specs(model):
            if parameter.requires_grad:
                parameter.main_grad.mul_(factor)  # type: ignore[attr-defined]
    return norm


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of the squares in fp64, a 0-dim tensor."""
    total = torch.zeros((), dtype=torch.float64, device=gradient.device)
    for block in gradient.reshape(-1).split(_BLOCK[gradient.device.type]):
        wide = block.double()
        total += torch.dot(wide, wide)
    return total
