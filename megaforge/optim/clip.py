"""The norm of the whole model's gradient, the same number on every rank of every layout, and limits to gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.param_spec import KINDS, main_grad_of, named_specs

# Squares are summed in fp64, block by block: a block of fp64 stays in a CPU's cache (4x the speed of one fp64 copy),
# while a GPU wants few and large ones.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
_KINDS = {kind: place for place, kind in enumerate(KINDS)}

Read = Callable[[Tensor], list[float]]


@dataclass(frozen=True)
class GradientLimits:
    """How large a gradient may be; 0 sets no limit. They hold one after the other: elements, then kinds, then all.

    Attributes:
        norm: of the 2-norm of the whole gradient.
        kind_norm: of the 2-norm of the gradient of each kind of parameter (``ParamSpec.kind``).
        value: of the magnitude of each element.
    """

    norm: float = 0.0
    kind_norm: float = 0.0
    value: float = 0.0

    @classmethod
    def of(cls, config: OptimizerConfig) -> GradientLimits:
        """What the flags ask for."""
        return cls(config.clip_grad, config.clip_grad_per_group, config.clip_grad_value)


@dataclass(frozen=True)
class _Measured:
    """Of the whole model's gradient as it lies there, loss scale included.

    Attributes:
        squares: sum of squares of each kind of parameter that the model has.
        limited: the same once elements are limited.
        beyond: share of the elements beyond the limit.
    """

    squares: dict[str, float]
    limited: dict[str, float]
    beyond: float = 0.0


def global_grad_norm(model: nn.Module, ctx: ParallelContext, read: Read = Tensor.tolist) -> float:
    """The 2-norm of all ``main_grad`` together, each element of the global model counted once: whole gradients on the
    first rank that has one, shares (ZeRO) on every rank of one copy.

    Gradients must be reduced already. A value that is not finite on any rank makes the norm inf or nan on all.

    Args:
        read: brings numbers (fp64 [n]) to the host: a step reads others with them, so that it waits once.
    """
    return math.sqrt(sum(_measure(model, ctx, 0.0, read).squares.values()))


def _by_kind(model: nn.Module, ctx: ParallelContext) -> dict[tuple[int, bool], list[Tensor]]:
    """Every ``main_grad`` by the kind of its parameter and whether this rank's is the first copy: on a GPU a list takes
    few launches, however long it is."""
    found: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
    for spec, parameter in named_specs(model):
        if parameter.requires_grad:
            first = optimizer_shard(parameter).is_first_copy(ctx)
            found[_KINDS.get(spec.kind, _KINDS["other"]), first].append(main_grad_of(parameter))
    return found


@torch.no_grad()
def _measure(model: nn.Module, ctx: ParallelContext, limit: float, read: Read) -> _Measured:
    """Looks at every ``main_grad`` once. ``limit``: of elements; 0 for none."""
    rows = torch.zeros(5 if limit else 2, len(_KINDS), dtype=torch.float64, device=ctx.device)
    squares, present, *more = rows.unbind()
    for (place, first), gradients in _by_kind(model, ctx).items():
        # Copies on other ranks are multiplied by 0 rather than left out: 0 x inf = nan reaches every rank.
        own = sum_of_squares(gradients)
        squares[place] += own if first else own * 0.0
        present[place] = 1.0
        if limit:
            limited, beyond, elements = more
            for gradient in gradients:
                limited[place] += sum_of_squares([gradient], limit) * first
                beyond[place] += (gradient.abs() > limit).sum() * first
                elements[place] += gradient.numel() * first
    if ctx.world.size > 1:
        dist.all_reduce(rows, group=ctx.world.group)
    numbers = read(rows.flatten())
    values, holders, *others = (numbers[i : i + len(_KINDS)] for i in range(0, len(numbers), len(_KINDS)))
    # Other ranks hold what this one may not: a stage without the head has its norm too.
    kinds = {kind: place for kind, place in _KINDS.items() if holders[place]}
    found = {kind: values[place] for kind, place in kinds.items()}
    if not limit:
        return _Measured(found, found)
    return _Measured(
        found, {kind: others[0][place] for kind, place in kinds.items()}, sum(others[1]) / max(sum(others[2]), 1.0)
    )


@torch.no_grad()
def clip_gradients(
    model: nn.Module,
    ctx: ParallelContext,
    limits: GradientLimits | float,
    loss_scale: float = 1.0,
    metrics: dict[str, float] | None = None,
    read: Read = Tensor.tolist,
) -> float:
    """Divides every ``main_grad`` by ``loss_scale`` and brings it within ``limits``, the same at every layout.

    Args:
        limits: a number is one of the global norm alone.
        loss_scale: the factor that the loss carried.
        metrics: takes what there is to record besides the norm: that of each kind of parameter (``grad_norm/KIND``),
            whether a norm was beyond its limit (``clipped``: 0 or 1), and with a limit of elements the share of those
            beyond it (``clamped``).
        read: see :func:`global_grad_norm`.

    Returns:
        The global norm before clipping, without the loss scale; the same on every rank. When it is not finite the
        gradients are left as they are, and the step must be skipped.
    """
    limits = limits if isinstance(limits, GradientLimits) else GradientLimits(limits)
    measured = _measure(model, ctx, limits.value * loss_scale, read)
    norm = math.sqrt(sum(measured.squares.values())) / loss_scale
    factors = _factors(measured.limited, limits, loss_scale) if math.isfinite(norm) else {}
    if metrics is not None:
        kinds = {kind: math.sqrt(square) / loss_scale for kind, square in measured.squares.items()}
        metrics.update({f"grad_norm/{kind}": value for kind, value in kinds.items()})
        metrics["clipped"] = float(any(factor != 1 / loss_scale for factor in factors.values()))
        if limits.value:
            metrics["clamped"] = measured.beyond
    for (place, _), gradients in _by_kind(model, ctx).items() if factors else ():
        if limits.value:
            torch._foreach_clamp_min_(gradients, -limits.value * loss_scale)
            torch._foreach_clamp_max_(gradients, limits.value * loss_scale)
        factor = factors[KINDS[place]]
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
    return norm


def _factors(squares: dict[str, float], limits: GradientLimits, loss_scale: float) -> dict[str, float]:
    """What the gradients of each kind are multiplied by."""
    norms = {kind: math.sqrt(square) / loss_scale for kind, square in squares.items()}
    total = math.sqrt(sum(squares.values())) / loss_scale
    factors = dict.fromkeys(squares, 1 / loss_scale)
    if limits.kind_norm:
        for kind, norm in norms.items():
            if norm > limits.kind_norm:
                factors[kind] *= limits.kind_norm / norm
                norms[kind] = limits.kind_norm
        total = math.hypot(*norms.values())
    if limits.norm and total > limits.norm:
        factors = {kind: factor * (limits.norm / total) for kind, factor in factors.items()}
    return factors


def sum_of_squares(gradients: Sequence[Tensor], limit: float | None = None) -> Tensor:
    """Sum of the squares in fp64, a 0-dim tensor; of values brought within ``limit`` where there is one."""
    if limit is None and gradients[0].device.type == "cuda":
        return sum_of_squares_by_list(gradients)
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        own = torch.zeros_like(total)
        for block in gradient.reshape(-1).split(_BLOCK.get(gradient.device.type, 1 << 24)):
            wide = block.double() if limit is None else block.clamp(-limit, limit).double()
            own += torch.dot(wide, wide)
        total += own
    return total


def sum_of_squares_by_list(gradients: Sequence[Tensor]) -> Tensor:
    """:func:`sum_of_squares` as a GPU does it: gradients are read once, as they lie, in a few launches for all."""
    some = [gradient for gradient in gradients if gradient.numel()]
    if not some:
        return torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    return torch.stack(torch._foreach_norm(some, 2.0, dtype=torch.float64)).square_().sum()
