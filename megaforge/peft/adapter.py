"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) beside a layer of the linear family, split as it is:
``y = x W^T + scale * (x A^T) B^T`` of each logical matrix that has one.

The adapter's output is in the state of the layer's: split over tp where a column layer's is, partial sums where a row
layer's are. So A of a column layer and B of a row layer are whole on every rank. Where ranks see different tokens
(sequence parallelism), or where what follows is a rank's own heads or columns, each has a part of the gradient of such
a factor, and declares it (:attr:`megaforge.parallel.param_spec.ParamSpec.tp_partial_grad`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.dropout import Dropout, drop_inputs
from megaforge.parallel.init_rules import Constant, InitRule, Uniform
from megaforge.parallel.layers import GroupedLinear, Linear, RowParallelLinear
from megaforge.parallel.linear_op import PLAIN, LinearOp, Quantized
from megaforge.parallel.mappings import copy_to_tensor_parallel, reduce_from_tensor_parallel, scale_gradient
from megaforge.parallel.param_spec import ParamSpec, make_parameter, spec_of
from megaforge.parallel.region import TensorParallelRegion


class Factors(NamedTuple):
    """An adapter of one logical matrix.

    Attributes:
        part: the matrix's name among those that are fused in the layer, or nothing.
        rank: rows of A, columns of B.
        scale: on its output.
        start, stop: its output features among the layer's, of the whole matrix.
    """

    part: str
    rank: int
    scale: float
    start: int
    stop: int

    @property
    def prefix(self) -> str:
        """Of the names of its parameters."""
        return f"{self.part}_" if self.part else ""


Declaration = tuple[tuple[int, ...], InitRule, dict[str, Any]]  # shape, initial rule, how it is split


class Adapter(nn.Module):
    """The adapters of one layer, of which it is a child; the layer's op adds what they make.

    A starts uniform within 1/sqrt(in), as ``peft`` has it (kaiming_uniform_ with a = sqrt(5)), B at zero.

    Attributes:
        factors: what there are; their parameters are ``A`` and ``B``, ``q_A`` and ``q_B``, ...
        dropout: the masks of the present micro-batch; None: nothing is dropped.
    """

    def __init__(
        self,
        layer: Linear,
        factors: Sequence[Factors],
        ctx: ParallelContext,
        *,
        rate: float = 0.0,
        site: tuple[int, int] = (0, 0),
    ) -> None:
        """
        Args:
            rate: share of the input that is dropped in training.
            site: the block, and the place in it, that masks are of.
        """
        super().__init__()
        self.factors, self.ctx, self.rate, self.site = tuple(factors), ctx, rate, site
        self.dropout: Dropout | None = None
        self.out_rows, self.width = layer.matrix.shape[-2:]
        self.out_features, self.splits_input = layer.out_features, isinstance(layer, RowParallelLinear)
        self.etp: Axis | None = None
        if isinstance(layer, GroupedLinear):
            self.etp, self.splits_input = ctx.etp, layer.axis is not None
        for one in self.factors:
            for letter, (shape, init, declared) in self.declarations(layer, one).items():
                spec = ParamSpec("", shape, init, role="matrix", update="elementwise", kind="adapter", **declared)
                place = layer.weight.device if layer.weight.is_meta else None
                self.register_parameter(one.prefix + letter, make_parameter(spec, ctx, layer.weight.dtype, place))

    def declarations(self, layer: Linear, factors: Factors) -> Mapping[str, Declaration]:
        """Of the parameters that an adapter has, by the ends of their names."""
        first, second = _declarations(layer, factors, self.splits_input)
        return {"A": first, "B": second}

    @property
    def letters(self) -> tuple[str, ...]:
        """Ends of the names of what an adapter has, A and B first."""
        prefix = self.factors[0].prefix
        return tuple(name.removeprefix(prefix) for name in self._parameters if name.startswith(prefix))

    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """(A, B) of this rank, with all that is between them in A."""
        return getattr(self, f"{factors.prefix}A"), getattr(self, f"{factors.prefix}B")

    def local_rows(self, factors: Factors) -> slice:
        """The output features of an adapter among those that this rank has of the layer's."""
        share = self.out_features // self.out_rows  # of every logical matrix a rank has the same
        return slice(factors.start // share, factors.stop // share)

    def output(
        self, x: Tensor, region: TensorParallelRegion | None, leaves: TensorParallelRegion | None, runs: Runs | None
    ) -> Tensor:
        """What there is to add to the layer's output, given its input; see :meth:`LinearOp.apply`."""
        x = self._dropped(x, region)
        made = []
        for factors in self.factors:
            first, second = self.pair(factors)
            made.append(self._product(x, first, second, region, leaves, runs) * factors.scale)
        return self.placed(made)

    def _product(
        self,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        region: TensorParallelRegion | None,
        leaves: TensorParallelRegion | None,
        runs: Runs | None,
    ) -> Tensor:
        if self.etp is not None:
            return _of_experts(x, first, second, self.etp, runs, split_input=self.splits_input)
        return PLAIN.apply(inner_features(x, first, region, leaves), second)

    def placed(self, made: list[Tensor]) -> Tensor:
        """The outputs of all factors where the layer has them; zero where it has no adapter."""
        pieces, end = [], 0
        for one, out in zip(self.factors, made, strict=True):
            rows = self.local_rows(one)
            if (gap := rows.start - end) > 0:
                pieces.append(out.new_zeros(*out.shape[:-1], gap))
            pieces.append(out)
            end = rows.stop
        if end < self.out_rows:
            pieces.append(made[0].new_zeros(*made[0].shape[:-1], self.out_rows - end))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _dropped(self, x: Tensor, region: TensorParallelRegion | None) -> Tensor:
        if self.dropout is None or not self.rate or self.etp is not None:
            return x
        rows = self.dropout.rows(*self.site)
        rows = rows if region is None else region.own(rows)
        start = self.ctx.tp.rank * self.width if self.splits_input else 0
        return drop_inputs(x, rows, self.rate, start)

    def extra_repr(self) -> str:
        each = ", ".join(f"{one.part or 'whole'}: rank {one.rank}, scale {one.scale:g}" for one in self.factors)
        return f"{each}, dropout={self.rate:g}"


def inner_features(
    x: Tensor, first: Tensor, region: TensorParallelRegion | None, leaves: TensorParallelRegion | None
) -> Tensor:
    """``x A^T`` [..., rank] of the tokens that the layer's output has, complete; see :meth:`LinearOp.apply`."""
    inner = PLAIN.apply(x, first)
    if region is not None:
        inner = region.enter(inner)  # rank-wide in place of the layer's width
    return inner if leaves is None else leaves.exit(inner)


def _declarations(layer: Linear, factors: Factors, splits_input: bool) -> tuple[Declaration, Declaration]:
    """Of A and of B."""
    spec = spec_of(layer.weight)
    *stack, _, _ = spec.shape
    first = (*stack, factors.rank, layer.in_features)
    second = (*stack, factors.stop - factors.start, factors.rank)
    parts = {} if factors.part else {"parts": spec.parts}
    of_first: dict[str, Any]
    of_second: dict[str, Any]
    if stack:
        of_first, of_second = ({"shard_dim": 2}, {}) if splits_input else ({}, {"shard_dim": 1, **parts})
        for declared in (of_first, of_second):
            declared.update(expert_dim=0, shard_axis="etp")
    else:
        region: TensorParallelRegion | None = getattr(layer, "region", None)
        whole = {"tp_partial_grad": region is None or region.sequence_parallel}
        of_first = {"shard_dim": 1} if splits_input else whole
        of_second = whole if splits_input or spec.shard_dim is None else {"shard_dim": 0, **parts}
    return (first, Uniform(1 / math.sqrt(layer.in_features)), of_first), (second, Constant(0.0), of_second)


def _of_experts(x: Tensor, first: Tensor, second: Tensor, etp: Axis, runs: Runs | None, *, split_input: bool) -> Tensor:
    """Adapters of experts. What is whole on every rank of etp gets a whole gradient there: a stack that is split over
    ep cannot be declared partial. What goes into the layer has partial gradients over etp, and what a layer that
    splits its input gives are partial sums."""
    if not split_input:
        inner = PLAIN.apply(scale_gradient(x, 1 / etp.size), first, runs=runs)
        return PLAIN.apply(copy_to_tensor_parallel(inner, etp), second, runs=runs)
    inner = reduce_from_tensor_parallel(PLAIN.apply(x, first, runs=runs), etp)
    out = PLAIN.apply(inner, second, runs=runs)
    return scale_gradient(out / etp.size, etp.size)


class AdaptedOp(LinearOp):
    """Another op, and what an adapter adds to its product."""

    def __init__(self, base: LinearOp, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.quantizes = base.quantizes

    @property
    def sums_exactly(self) -> bool:
        return self.base.sums_exactly

    def encode(self, x: Tensor, axis: Axis | None) -> tuple[Tensor, ...]:
        return self.base.encode(x, axis)

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        return self.base.forward(inside, weight, bias, runs)

    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        return self.base.input_gradient(grad, weight, runs)

    def weight_gradient(
        self, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None
    ) -> Tensor:
        return self.base.weight_gradient(grad, inside, weight, runs)

    def quantize(self, weight: Tensor) -> Quantized:
        return self.base.quantize(weight)

    def make_ready(self, weight: Tensor) -> None:
        self.base.make_ready(weight)

    def forget(self) -> None:
        self.base.forget()

    def after_update(self, weight: Tensor, ctx: ParallelContext) -> None:
        self.base.after_update(weight, ctx)

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        axis: Axis | None = None,
        region: TensorParallelRegion | None = None,
        leaves: TensorParallelRegion | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        out = self.base.apply(x, weight, bias, axis=axis, region=region, leaves=leaves, runs=runs)
        return out + self.adapter.output(x, region, leaves, runs)
