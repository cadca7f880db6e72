"""A toy quantizer, as a user would write one: matrices and activations as 8-bit codes, gradients straight through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaforge.config.launcher import print_rank_0
from megaforge.kernels.grouped_mm import Runs
from megaforge.models.converters import linears
from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.linear_op import PLAIN, LinearOp, Quantized
from megaforge.parallel.param_spec import spec_of
from megaforge.registry import CONVERTERS


class Int8Linear(LinearOp):
    """Each token has a scale of its own, and so has each matrix; that of a matrix holds until the next update.

    A real one would multiply the codes; this one multiplies what they stand for.
    """

    quantizes = True

    def __init__(self, axis: Axis | None) -> None:
        """``axis``: over which the matrix is split."""
        self.axis = axis
        self.scale: Tensor | None = None

    def encode(self, x: Tensor, axis: Axis | None) -> tuple[Tensor, ...]:
        scale = max_over(x.detach().abs().amax(-1, keepdim=True), axis).clamp_min(1e-9) / 127
        return (x.detach() / scale).round().to(torch.int8), scale

    def _matrix(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        if self.scale is None:
            self.scale = max_over(weight.abs().amax((-2, -1), keepdim=True), self.axis).clamp_min(1e-9) / 127
        return (weight / self.scale).round() * self.scale

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        return PLAIN.forward((_decoded(inside),), self._matrix(weight), bias, runs)

    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        return PLAIN.input_gradient(grad, self._matrix(weight), runs)

    def weight_gradient(
        self, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None
    ) -> Tensor:
        return PLAIN.weight_gradient(grad, (_decoded(inside),), weight, runs)

    def quantize(self, weight: Tensor) -> Quantized:
        values = self._matrix(weight)
        assert self.scale is not None
        return Quantized(values, 127 * self.scale)

    def forget(self) -> None:
        self.scale = None


def _decoded(inside: tuple[Tensor, ...]) -> Tensor:
    codes, scale = inside
    return codes.to(scale.dtype) * scale


def int8(model: nn.Module, ctx: ParallelContext) -> None:
    """All but the head and the routers."""
    layers = [layer for path, layer in linears(model) if not path.endswith(("head", "router"))]
    for layer in layers:
        spec = spec_of(layer.weight)
        layer.op = Int8Linear(None if spec.shard_dim is None else ctx.axis(spec.shard_axis))
    if ctx.device.type != "meta":  # others are only counted
        print_rank_0(f"int8: {len(layers)} matrices")


CONVERTERS.register("int8", int8)
