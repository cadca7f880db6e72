"""Quantized matrices of which only codes and steps are left: for evaluation and generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megaforge.kernels.bitgemm import BITS, TYPES, Prepared, bit_linear, bit_product, pack, prepare
from megaforge.kernels.grouped_mm import Runs
from megaforge.parallel.context import Axis
from megaforge.parallel.layers import Linear, linears
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.products import step_by_row, unscaled_product
from megaforge.quant.quantizers import Scale, WeightScheme
from megaforge.quant.ranges import Ranges


class KnownScale:
    """Steps that no longer change (:class:`megaforge.quant.scales.ScaleSource`)."""

    ranges: Ranges | None = None

    def __init__(self, scale: Scale) -> None:
        self._scale = scale

    def scale(self, weight: Tensor) -> Scale:
        return self._scale

    def forget(self) -> None:
        raise RuntimeError("a matrix of codes alone cannot be trained")

    def set_scheme(self, scheme: WeightScheme) -> None:
        raise RuntimeError("a matrix of codes alone has the scheme of its codes")

    def places(self, weight: Tensor) -> Tensor:
        raise RuntimeError("a matrix of codes alone has no noise: that is for training")


class PackedLinear(QuantizedLinear):
    """The product of a :class:`QuantizedLinear` in evaluation, from its codes: the same numbers.

    Codes are kept as int8, or with ``kernels`` as :mod:`megaforge.kernels.bitgemm` reads them, in 1, 2 or 4 bits; there
    steps of groups are applied to integer sums, which rounds otherwise than the quantized weights do.
    """

    def __init__(self, op: QuantizedLinear, codes: Tensor, scale: Scale, *, dtype: torch.dtype, kernels: bool) -> None:
        """
        Args:
            op: whose product it takes over.
            codes: int8 [(E,) N, K], of this rank's shard.
            scale: their steps, as ``op.codes`` gives them.
            dtype: of the model.
            kernels: use the packed kernels, where they have this product.

        Raises:
            ValueError: these are not codes of a matrix, or of a stack of them.
        """
        if codes.dtype != torch.int8 or codes.dim() not in (2, 3):
            raise ValueError(f"codes are int8 [(E,) N, K], not {codes.dtype} {list(codes.shape)}")
        source = KnownScale(scale)
        super().__init__(op.weights, op.activations, source, layer=op.layer, rotation=op.rotation, ranges=op.ranges)
        assert op.weights is not None
        symmetric = op.activations is not None and not (op.activations.asymmetric or op.weights.asymmetric)
        self._codes_held, self._prepared = codes, list[Prepared]()
        if kernels and symmetric and op.weights.kind in BITS and dtype in TYPES:
            stack, steps = (codes, scale.step) if codes.dim() == 3 else (codes.unsqueeze(0), scale.step.unsqueeze(0))
            self._prepared = [
                prepare(pack(one, step_by_row(step, one.shape[0]), op.weights.kind))
                for one, step in zip(stack, steps, strict=True)
            ]
            self._codes_held = codes.new_empty(0)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._codes_held.device

    @property
    def uses_kernels(self) -> bool:
        """Whether the packed kernels multiply."""
        return bool(self._prepared)

    @property
    def whole_product(self) -> Prepared | None:
        """The matrix, where the product is nothing but :func:`bit_linear` of 8-bit tokens with it."""
        plain = not self.rotation and (self.ranges is None or not self.ranges.changes_inputs)
        eight = self.activations is not None and self.activations.bits == 8
        return self._prepared[0] if plain and eight and len(self._prepared) == 1 else None

    @property
    def num_bytes(self) -> int:
        """Of the codes as they are kept."""
        return self._codes_held.numel() + sum(one.num_bytes for one in self._prepared)

    def encode(self, x: Tensor, axis: Axis | None) -> tuple[Tensor, ...]:
        by_token = self.ranges is None or not self.ranges.changes_inputs
        if by_token and self._prepared and not self.rotation and (axis is None or axis.size == 1) and x.dtype in TYPES:
            return (x.detach(),)  # the kernel finds the same codes, in one pass
        return super().encode(x, axis)

    def forward(
        self, inside: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None = None, runs: Runs | None = None
    ) -> Tensor:
        if not self._prepared:
            return super().forward(inside, weight, bias, runs)
        if len(inside) == 1:
            assert self.activations is not None
            bits = self.activations.bits

            def product(part: slice, one: Prepared) -> Tensor:
                return bit_linear(inside[0][part], one, bias, bits)
        else:

            def product(part: slice, one: Prepared) -> Tensor:
                return bit_product(inside[0][part], inside[1][part], one, bias, weight.dtype)

        if runs is None:
            return product(slice(None), self._prepared[0])
        out = weight.new_zeros((len(inside[0]), self._prepared[0].shape[0]))  # rows beyond the last run are nobody's
        for part, one in zip(runs.parts(), self._prepared, strict=True):
            if part.start < part.stop:
                out[part] = product(part, one)
        return out

    def sums(self, inside: tuple[Tensor, ...], weight: Tensor, runs: Runs | None = None) -> Tensor:
        if not self._prepared or runs is not None:
            return super().sums(inside, weight, runs)
        [one] = self._prepared
        return unscaled_product(inside[0], one)

    def _codes(self, weight: Tensor, scale: Scale) -> Tensor:
        return self._codes_held


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Linear, QuantizedLinear]]:
    """The layers of ``model`` whose matrices ``--quantize-weights`` turns into codes, with their paths."""
    for path, layer in linears(model):
        if isinstance(layer.op, QuantizedLinear) and layer.op.weights is not None:
            yield path, layer, layer.op


def keep_codes(layer: Linear, op: PackedLinear) -> None:
    """Gives ``layer`` the op, and takes its weights away."""
    layer.op = op
    nothing = layer.weight.new_empty((0, 0), device=op.device)
    layer.weight = nn.Parameter(nothing, requires_grad=False)


@torch.no_grad()
def pack_model(model: nn.Module, *, kernels: bool) -> int:
    """Turns the quantized matrices of a trained model into codes. Collective: steps are of whole matrices.

    Returns:
        How many.
    """
    found = [(layer, op, *op.codes(layer.matrix)) for _, layer, op in quantized_layers(model)]
    for layer, op, codes, scale in found:
        keep_codes(layer, PackedLinear(op, codes, scale, dtype=layer.weight.dtype, kernels=kernels))
    return len(found)
