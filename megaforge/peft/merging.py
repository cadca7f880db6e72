"""Adapters that become a part of the matrices beside which they stood: ``W + scale * B A``, summed in fp64 and rounded
once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import Linear
from megaforge.parallel.linear_op import LinearOp
from megaforge.parallel.param_spec import Box, ParamSpec
from megaforge.peft.adapter import AdaptedOp, Adapter
from megaforge.peft.lora import adapters


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a box of a parameter.

    Attributes:
        box: where, in the whole parameter; one expert of a stack.
        first, second: A [r, in] and B [out, r], whole.
        scale: on their product.
        transposed: whether the parameter is stored as [in, out].
    """

    box: Box
    first: Tensor
    second: Tensor
    scale: float
    transposed: bool = False

    def add(self, target: Tensor, at: Box) -> Tensor:
        """``target``, which lies ``at`` in the whole parameter, with what is to be added there."""
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.box, at, strict=True)]
        if any(start >= stop for start, stop in common):
            return target
        rows, columns = (slice(a - c, b - c) for (a, b), (c, _) in zip(common[-2:], self.box[-2:], strict=True))
        if self.transposed:
            rows, columns = columns, rows
        product = self.scale * (self.second[rows].double() @ self.first[:, columns].double())
        product = product.t() if self.transposed else product
        place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, at, strict=True))
        out = target.clone()
        out[place] = (out[place].double() + product.view(out[place].shape).to(out.device)).to(out.dtype)
        return out


@torch.no_grad()
def add_deltas(parameter: Tensor, spec: ParamSpec, deltas: Sequence[Delta], ctx: ParallelContext) -> None:
    """Adds to this rank's shard of a parameter."""
    for piece in spec.pieces(ctx):
        local = piece.local_view(parameter)
        for delta in deltas:
            local.copy_(delta.add(local, piece.global_box))


@dataclass(frozen=True)
class _Before:
    layer: Linear
    adapter: Adapter
    op: LinearOp
    weight: Tensor


class Merged:
    """The adapters of a model, merged into its matrices on this rank until :meth:`undo`; matrices of other products
    than the plain one (codes of a quantizer or of QLoRA) keep theirs beside them.

    Attributes:
        merged, left: how many layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: list[_Before] = []
        self.left = 0
        for _, layer, adapter in list(adapters(model)):
            assert isinstance(layer.op, AdaptedOp)
            if layer.op.base.quantizes or not layer.op.base.keeps_weight:
                self.left += 1
            else:
                self._merge(layer, layer.op, adapter)

    @property
    def merged(self) -> int:
        return len(self._before)

    @torch.no_grad()
    def _merge(self, layer: Linear, op: AdaptedOp, adapter: Adapter) -> None:
        self._before.append(_Before(layer, adapter, op, layer.weight.detach().clone()))
        for factors in adapter.factors:
            first, second = adapter.pair(factors)
            rows = layer.matrix[..., adapter.local_rows(factors), :]
            rows.copy_(rows.double() + factors.scale * (second.double() @ first.double()))
        layer.op = op.base
        del layer.lora

    @torch.no_grad()
    def undo(self) -> None:
        """The matrices and their adapters as they were, to the bit."""
        for one in self._before:
            one.layer.weight.copy_(one.weight)
            one.layer.add_module("lora", one.adapter)
            one.layer.op = one.op
        self._before.clear()
