"""The steps of a model's matrices, which belong to logical matrices: to q, k and v, gate and up, each expert. However a
matrix is cut, they are those of the whole one.

Steps of whole matrices are renewed together, once after each update, when the first product asks for one: each rank
adds up in fp64 what it holds (under ZeRO its own slices alone, which are there before the gathers have ended), and one
vector is summed over tp and over the replicas. They are of the weights as the model computes with them: in bf16, of the
rounded ones, so that a file of those weights has the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.param_spec import ParamSpec, spec_of
from megaforge.quant.quantizers import Scale, Statistics, WeightScheme, clipped, weight_scale, weight_statistics
from megaforge.quant.ranges import Ranges


class ScaleSource(Protocol):
    """Where an op has the steps of its matrix from.

    Attributes:
        ranges: of the layer, where it has some: what share of the weights' range levels reach.
    """

    ranges: Ranges | None

    def scale(self, weight: Tensor) -> Scale:
        """Of this rank's shard [(E,) N, K]; the same until :meth:`forget`. Collective the first time."""

    def forget(self) -> None:
        """The weights have changed."""

    def set_scheme(self, scheme: WeightScheme) -> None:
        """Another scheme, of the same granularity; the steps are forgotten."""

    def places(self, weight: Tensor) -> Tensor:
        """Like ``weight``: the number of each weight in the whole parameter, of which the low 32 bits count."""


class WholeMatrix:
    """Of a matrix whose steps belong to rows or groups, or that no other rank has a part of."""

    def __init__(
        self, scheme: WeightScheme, spec: Callable[[], ParamSpec] | None = None, ctx: ParallelContext | None = None
    ) -> None:
        """``spec``: declares the matrix among the ranks of ``ctx``; None: it is alone."""
        self._scheme, self._spec, self._ctx = scheme, spec, ctx
        self._scale: Scale | None = None
        self.ranges: Ranges | None = None

    @property
    def _axis(self) -> Axis | None:
        """What splits rows of the matrix, each over all its ranks."""
        if self._spec is None or self._ctx is None or self._scheme.granularity != "channel":
            return None
        spec = self._spec()
        return self._ctx.axis(spec.shard_axis) if spec.shard_dim == len(spec.shape) - 1 else None

    def scale(self, weight: Tensor) -> Scale:
        if self._scale is None:
            found = weight_statistics(weight.detach(), self._scheme)
            if (axis := self._axis) is not None and axis.size > 1 and not weight.is_meta:
                found = _over(axis, found, self._scheme)
            share = None if self.ranges is None else self.ranges.weight_clip
            self._scale = weight_scale(clipped(found, self._scheme, share), self._scheme, weight.dtype)
        return self._scale

    def forget(self) -> None:
        self._scale = None

    def set_scheme(self, scheme: WeightScheme) -> None:
        self._scheme = scheme
        self.forget()

    def places(self, weight: Tensor) -> Tensor:
        if self._spec is None or self._ctx is None:
            return torch.arange(weight.numel(), device=weight.device).view(weight.shape)
        return places(self._spec(), weight, self._ctx)


def _over(axis: Axis, found: Statistics, scheme: WeightScheme) -> Statistics:
    both = torch.stack((found.first, found.second))
    if scheme.by_mean:
        dist.all_reduce(both, group=axis.group)
        return Statistics(both[0], both[1], found.number * axis.size)
    both = max_over(both, axis)
    return Statistics(both[0], both[1], found.number)


class LogicalMatrices:
    """One parameter of :class:`ModelScales`: a matrix, several fused in one, or a stack of experts'."""

    def __init__(self, model: ModelScales, parameter: nn.Parameter) -> None:
        self._model, self.parameter = model, parameter
        self.known: Scale | None = None
        self.ranges: Ranges | None = None

    def scale(self, weight: Tensor) -> Scale:
        if self.known is None:
            self._model.renew()
        assert self.known is not None
        return self.known

    def forget(self) -> None:
        self.known = None

    def set_scheme(self, scheme: WeightScheme) -> None:
        self._model.scheme = scheme  # all of a model's matrices have one
        self.forget()

    def places(self, weight: Tensor) -> Tensor:
        return places(spec_of(self.parameter), weight, self._model.ctx)


class ModelScales:
    """The steps of all matrices of a model, or of this rank's stage of it, whose steps belong to whole matrices."""

    def __init__(self, scheme: WeightScheme, ctx: ParallelContext) -> None:
        self.scheme, self.ctx = scheme, ctx
        self._matrices: list[LogicalMatrices] = []

    def add(self, parameter: nn.Parameter) -> LogicalMatrices:
        """The steps of ``parameter`` [(E,) N, K]."""
        self._matrices.append(LogicalMatrices(self, parameter))
        return self._matrices[-1]

    @torch.no_grad()
    def renew(self) -> None:
        """Of all that have been forgotten. Collective: every rank of the stage forgets the same ones."""
        stale = [one for one in self._matrices if one.known is None]
        slots = [_slots(spec_of(one.parameter)) for one in stale]
        ends = list(accumulate(slots, initial=0))
        device = stale[0].parameter.device
        both = torch.full((2, ends[-1]), 0.0 if self.scheme.by_mean else -math.inf, dtype=torch.float64, device=device)
        if device.type == "meta":
            reduced = both
        else:
            for one, start, stop in zip(stale, ends, ends[1:], strict=False):
                self._add_own(one.parameter, both[:, start:stop])
            reduced = self._reduced(both)
        for one, start, stop in zip(stale, ends, ends[1:], strict=False):
            share = None if one.ranges is None else one.ranges.weight_clip
            one.known = self._own_scale(one.parameter, reduced[:, start:stop], share)

    def _add_own(self, parameter: nn.Parameter, both: Tensor) -> None:
        """Adds what this rank holds, where no other rank counts the same."""
        held = optimizer_shard(parameter)
        if not held.is_first_copy(self.ctx):
            return
        local = parameter.detach()
        if isinstance(held, FlatShard):
            local = local.view(-1)[held.start : held.stop]
        spec = spec_of(parameter)
        for piece in held.pieces(self.ctx):
            view = piece.local_view(local)
            if not view.numel():
                continue
            found = weight_statistics(view.flatten(1)[:, None] if spec.expert_dim == 0 else view[None], self._tensor)
            first, number = _slot(spec, piece.global_box), len(found.first)
            places = slice(first, first + (number - 1) * _parts(spec) + 1, _parts(spec))
            for total, part in zip(both, found[:2], strict=True):
                part = part.flatten()
                total[places] = total[places] + part if self.scheme.by_mean else torch.maximum(total[places], part)

    @property
    def _tensor(self) -> WeightScheme:
        return WeightScheme(self.scheme.kind, asymmetric=self.scheme.asymmetric)

    def _reduced(self, both: Tensor) -> Tensor:
        for axis in (self.ctx.tp, self.ctx.dp_cp):
            if axis.size > 1:
                how = dist.ReduceOp.SUM if self.scheme.by_mean else dist.ReduceOp.MAX
                dist.all_reduce(both, op=how, group=axis.group)
        return both

    def _own_scale(self, parameter: nn.Parameter, both: Tensor, share: Tensor | None) -> Scale:
        """Of this rank's experts, and of each row where rows are of several matrices; ``share``: as in
        :func:`clipped`."""
        spec, ctx = spec_of(parameter), self.ctx
        parts, experts = _parts(spec), 1 if spec.expert_dim is None else spec.shape[spec.expert_dim]
        sizes = torch.tensor(spec.parts or (1,), dtype=torch.float64, device=both.device)
        counts = sizes * (spec.numel / experts / (sum(spec.parts) or 1))
        first, second = both.view(2, experts, parts)
        if self.scheme.by_mean:
            first, second = first / counts, second / counts
        found = clipped(Statistics(first, second, 1), self.scheme, share)
        return weight_scale(found, self.scheme, parameter.dtype).each(lambda one: _rows(one, spec, ctx))


def _rows(values: Tensor, spec: ParamSpec, ctx: ParallelContext) -> Tensor:
    """[E, parts] -> [(own E,) own N or 1, 1]."""
    if spec.expert_dim is not None:
        own = spec.pieces(ctx)[0].global_box[spec.expert_dim]
        values = values[own[0] : own[1]]
    if spec.parts:
        size = ctx.axis(spec.shard_axis).size
        values = torch.cat(
            [one[:, None].expand(-1, n // size) for one, n in zip(values.t(), spec.parts, strict=True)], 1
        )
    return values.unsqueeze(-1) if spec.expert_dim is not None else values[0].unsqueeze(-1)


def _parts(spec: ParamSpec) -> int:
    return len(spec.parts) or 1


def _slots(spec: ParamSpec) -> int:
    return _parts(spec) * (1 if spec.expert_dim is None else spec.shape[spec.expert_dim])


def _slot(spec: ParamSpec, box: tuple[tuple[int, int], ...]) -> int:
    """The slot of a box, or of its first expert: one after the other for each expert, and in these for each part."""
    part = 0
    if spec.parts:
        assert spec.shard_dim is not None
        part = sum(box[spec.shard_dim][0] >= end for end in accumulate(spec.parts))
    return part + (0 if spec.expert_dim is None else box[spec.expert_dim][0]) * _parts(spec)


def places(spec: ParamSpec, weight: Tensor, ctx: ParallelContext) -> Tensor:
    """int32, like the shard ``weight``: the low 32 bits of the number of each element in the global parameter."""
    out = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    for piece in spec.pieces(ctx):
        view = piece.local_view(out)
        view.zero_()
        for dim, ((start, stop), size) in enumerate(zip(piece.global_box, spec.shape, strict=True)):
            index = torch.arange(start, stop, device=weight.device).to(torch.int32)
            view.mul_(size).add_(index.view(-1, *[1] * (len(spec.shape) - 1 - dim)))
    return out
