"""The products of quantized matrices, as ops of the linear family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megaforge.kernels.bitgemm import TYPES, Prepared, bit_product, pack_known, prepare
from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.collectives import max_over
from megaforge.parallel.context import Axis
from megaforge.parallel.flat_shard import flat_boxes
from megaforge.parallel.linear_op import PLAIN, LinearOp, Quantized
from megaforge.parallel.param_spec import Box
from megaforge.quant.noise import uniform
from megaforge.quant.products import code_product, multiplies_packed, step_by_row, unscaled_product
from megaforge.quant.quantizers import (
    ActivationScheme,
    Scale,
    WeightScheme,
    activation_codes,
    activation_levels,
    activation_range,
    activation_values,
    weight_codes,
    weight_values,
)
from megaforge.quant.ranges import Ranges
from megaforge.quant.rotation import rotate
from megaforge.quant.scales import ScaleSource

ROWS_TO_PACK = 2048  # tokens: of 2,048 x 2,048 weights packing takes as long as the product of 1,100 saves


@dataclass
class _Known:
    """Codes of a matrix between two updates; whether noise was added to the weights; as the kernels read them."""

    codes: Tensor
    noisy: bool
    packed: Prepared | None = None


class QuantizedLinear(LinearOp):
    """Quantized activations times quantized weights; gradients straight through both quantizers (Bengio et al.,
    arXiv 1308.3432): that of x is formed with the quantized weights, that of W with the quantized x, and neither is
    masked or reaches a step.

    Where steps belong to matrices or rows, forward multiplies codes, whose sums are exact, and scales the sums; what
    travels under sequence parallelism, and what the backward pass keeps, are the codes.

    Attributes:
        share: of the way from full precision to the quantized product, in [0, 1]: both operands are
            ``x + share * (q(x) - x)``.
    """

    share: float = 1.0

    def __init__(
        self,
        weights: WeightScheme | None,
        activations: ActivationScheme | None,
        source: ScaleSource | None,
        *,
        layer: nn.Module,
        noise: float = 0.0,
        rotation: int = 0,
        ranges: Ranges | None = None,
    ) -> None:
        """
        Args:
            weights: None leaves them as they are, and needs no ``source`` of steps.
            activations: None leaves them as they are.
            layer: what the op belongs to: in training, and only then, there is noise.
            noise: width of the uniform noise on weights before they are rounded, in steps.
            rotation: width of the blocks of activations that are rotated before they are quantized; 0: none.
            ranges: of the layer, where it has some.
        """
        if (weights is None) != (source is None):
            raise ValueError("quantized weights need a source of their steps, and only they do")
        self.weights, self.activations, self.source = weights, activations, source
        self.noise, self.rotation, self.ranges = noise, rotation, ranges
        if source is not None:
            source.ranges = ranges
        self.quantizes = weights is not None
        self.layer = layer
        self._known: _Known | None = None
        self._rows = self._rows_before = 0
        self._arrive = False  # whether codes come from other ranks, and the weights are not all here

    def make_ready(self, weight: Tensor) -> None:
        if self.weights is not None and self.share > 0:
            _ = self._codes(weight.detach(), self._scale(weight.detach()))

    @property
    def code_kind(self) -> str | None:
        clipped = self.ranges is not None and self.ranges.clip is not None
        if self.weights is None or self.weights.granularity != "tensor" or self.noise or clipped or self.share != 1:
            return None
        return self.weights.kind

    def codes_within(self, weight: Tensor, start: int, stop: int) -> Tensor:
        assert self.weights is not None
        weight = weight.detach()
        scale = self._scale(weight)
        codes = torch.empty(stop - start, dtype=torch.int8, device=weight.device)
        for first, box in flat_boxes(tuple(weight.shape), start, stop):
            some = weight[tuple(slice(*edges) for edges in box)]
            own = scale.each(partial(_within, box=box))
            codes[first - start :][: some.numel()] = weight_codes(some, own, self.weights).flatten()
        return codes

    def take_codes(self, codes: Tensor) -> None:
        self._known, self._arrive = _Known(codes, noisy=False), True

    def forget(self) -> None:
        self._known = None
        if self._rows:  # several forget between two products
            self._rows_before, self._rows = self._rows, 0
        if self.source is not None:
            self.source.forget()

    def set_weights(self, scheme: WeightScheme) -> None:
        """Another way to quantize the weights, of the same granularity; on every rank at once."""
        assert self.source is not None
        self.weights, self._known = scheme, None
        self.source.set_scheme(scheme)

    def encode(self, x: Tensor, axis: Axis | None) -> tuple[Tensor, ...]:
        x = x.detach()
        x = rotate(x, self.rotation) if self.rotation else x
        if self.ranges is not None and self.ranges.watches and self.layer.training:
            self.ranges.watch(x)
        if self.activations is None or self.share == 0:
            return (x,)
        codes, step = activation_codes(x, self._extent(x, axis, self.activations), self.activations)
        if self.share == 1:
            return codes, step
        return (torch.lerp(x, activation_values(codes, step).to(x.dtype), self.share),)

    def _extent(self, x: Tensor, axis: Axis | None, scheme: ActivationScheme) -> Tensor:
        """What the steps of tokens are made of: a static range needs no look at them, nor at other ranks."""
        static = self.ranges is not None and self.ranges.has_input
        own = None if static else max_over(activation_range(x, scheme), axis)
        if self.ranges is not None:
            return self.ranges.extent(own, x)
        assert own is not None
        return own

    @property
    def sums_exactly(self) -> bool:
        """Where codes are multiplied, and their steps do not change within a row."""
        if self.weights is None or self.activations is None:
            return False
        return self.share == 1 and self.weights.granularity != "group"

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        if not self.sums_exactly:
            return PLAIN.forward((_values(inside, weight),), self._matrix(weight.detach()), bias, runs)
        packed = self._packed(inside, weight.detach(), runs)
        if packed is not None:
            return bit_product(inside[0], inside[1], packed, bias, weight.dtype)
        out = self._scaled(self.sums(inside, weight, runs), inside[1], weight, runs)
        return (out if bias is None else out + bias.to(out.dtype)).to(weight.dtype)

    def sums(self, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None) -> Tensor:
        """Of codes: whole numbers, in fp32 or fp64."""
        assert self.weights is not None
        (codes, step), weight = inside, weight.detach()
        packed = self._packed(inside, weight, runs)
        if packed is not None:
            return unscaled_product(codes, packed)
        scale = self._scale(weight)
        matrix = self._codes(weight, scale)
        levels: Tensor = activation_levels(codes, step) if step.shape[-1] == 2 else codes
        if self.weights.asymmetric and scale.shift is not None:
            matrix = matrix.to(scale.step.dtype) - scale.shift
        return code_product(levels, matrix, weight.dtype, runs)

    def finish(self, sums: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None) -> Tensor:
        return self._scaled(sums, inside[0], weight, runs).to(weight.dtype)

    def _scaled(self, sums: Tensor, step: Tensor, weight: Tensor, runs: Runs | None) -> Tensor:
        return sums * _of_rows(self._scale(weight.detach()).step, sums, runs) * step[..., :1]

    def input_gradient(self, grad: Tensor, weight: Tensor, runs: Runs | None = None) -> Tensor:
        found = PLAIN.input_gradient(grad, self._matrix(weight.detach()), runs)
        return rotate(found, self.rotation) if self.rotation else found

    def weight_gradient(
        self, grad: Tensor, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None
    ) -> Tensor:
        return PLAIN.weight_gradient(grad, (_values(inside, weight),), weight, runs)

    def quantize(self, weight: Tensor) -> Quantized:
        """Without noise, and all of the way."""
        assert self.weights is not None
        scale = self._scale(weight)
        values = weight_values(self.codes(weight)[0], scale, self.weights)
        largest = scale.step * self.weights.largest_code
        if self.weights.asymmetric and scale.shift is not None:
            most = self.weights.largest_code
            largest = scale.step * torch.maximum(most - scale.shift, scale.shift + most + 1)
        if self.weights.granularity == "group":
            largest = largest.expand(self.weights.view(weight).shape).reshape(weight.shape)
        return Quantized(values.to(weight.dtype), largest.to(weight.dtype))

    def codes(self, weight: Tensor) -> tuple[Tensor, Scale]:
        """int8 codes of this rank's shard of the weights, without noise, and their steps."""
        assert self.weights is not None
        scale = self._scale(weight)
        return self._codes(weight, scale) if self._arrive else weight_codes(weight.detach(), scale, self.weights), scale

    def _scale(self, weight: Tensor) -> Scale:
        assert self.source is not None
        return self.source.scale(weight)

    def _codes(self, weight: Tensor, scale: Scale) -> Tensor:
        """What products see: the same until :meth:`forget`, in every micro-batch, recomputation and gradient."""
        assert self.weights is not None and self.source is not None
        noisy = bool(self.noise and self.layer.training)
        if self._known is None or self._known.noisy != noisy:
            if self._arrive:
                raise RuntimeError("codes were used before they had arrived; wait for parameters first")
            noise = None
            if noisy:
                place = self.weights.view(self.source.places(weight))
                noise = uniform(place, scale.step).mul_(self.noise).to(scale.step.dtype)
            self._known = _Known(weight_codes(weight, scale, self.weights, noise), noisy)
        return self._known.codes

    def _packed(self, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None) -> Prepared | None:
        """The codes as the packed kernels read them, where they are faster than products of int8: binary matrices on a
        CPU of many tokens between two updates, as far as the last interval tells."""
        codes, step = inside
        self._rows += codes.numel() // codes.shape[-1] if codes.numel() else 0
        assert self.weights is not None
        if self.weights.kind != "binary" or step.shape[-1] == 2 or self._rows_before < ROWS_TO_PACK:
            return None
        if runs is not None or weight.dtype not in TYPES or not multiplies_packed(codes.device):
            return None
        scale = self._scale(weight)
        matrix = self._codes(weight, scale)
        assert self._known is not None
        if self._known.packed is None:
            self._known.packed = prepare(pack_known(matrix, step_by_row(scale.step, matrix.shape[0]), "binary"))
        return self._known.packed

    def _matrix(self, weight: Tensor) -> Tensor:
        """What the product sees in place of the weights, in their type."""
        if self.weights is None or self.share == 0:
            return weight
        scale = self._scale(weight)
        values = weight_values(self._codes(weight, scale), scale, self.weights).to(weight.dtype)
        return values if self.share == 1 else torch.lerp(weight, values, self.share)


def _values(inside: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    return inside[0] if len(inside) == 1 else activation_values(*inside).to(weight.dtype)


def _within(values: Tensor, box: Box) -> Tensor:
    """What a box of the weights has of something that broadcasts to them."""
    sizes = values.shape
    box = box[len(box) - len(sizes) :]
    return values[tuple(slice(*edges) if size > 1 else slice(None) for size, edges in zip(sizes, box, strict=True))]


def _of_rows(step: Tensor, sums: Tensor, runs: Runs | None) -> Tensor:
    """Steps [1, 1] or [N, 1], with experts [E, 1, 1] or [E, N, 1], as what the sums [..., N] are multiplied by."""
    by_row = step.squeeze(-1)
    if runs is None:
        return by_row.view(-1)
    return by_row[runs.experts(len(sums))]
