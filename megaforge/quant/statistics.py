"""What quantization does to the weights of a model, in numbers; and what their packed codes take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import Linear, linears
from megaforge.parallel.param_spec import ParamSpec, named_specs, spec_of
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.quantizers import WeightScheme, weight_values

FULL_BYTES = 2  # of a weight in 16 bits


def quantized_layers(model: nn.Module) -> list[tuple[str, Linear, QuantizedLinear]]:
    """The layers of ``model`` whose ops are ours, with their paths."""
    return [(path, layer, layer.op) for path, layer in linears(model) if isinstance(layer.op, QuantizedLinear)]


@dataclass(frozen=True)
class QuantizedSize:
    """Of a whole model.

    Attributes:
        matrices: quantized ones, as parameters.
        elements, all_elements: weights in them, and in the model.
        full_bytes, packed_bytes: of the model in 16 bits; with its quantized matrices as packed codes with their steps.
        matrix_bytes: of the packed codes and steps alone.
        kept: what stays in full precision, by the ends of their names.
    """

    matrices: int
    elements: int
    all_elements: int
    full_bytes: int
    packed_bytes: int
    matrix_bytes: int
    kept: tuple[str, ...]

    @property
    def compression(self) -> float:
        """Bytes of the model in 16 bits over its packed bytes."""
        return self.full_bytes / self.packed_bytes


def quantized_size(model: nn.Module) -> QuantizedSize:
    """``model``: whole; one without memory (meta) will do."""
    schemes = {id(layer.weight): op.weights for _, layer, op in quantized_layers(model) if op.weights is not None}
    matrices = elements = total = matrix_bytes = rest = 0
    kept: dict[str, None] = {}
    for spec, parameter in named_specs(model):
        if spec.is_tied_copy:
            continue
        total += spec.numel
        scheme = schemes.get(id(parameter))
        if scheme is not None:
            matrices, elements = matrices + 1, elements + spec.numel
            matrix_bytes += packed_bytes(spec, scheme)
        else:
            rest += spec.numel * (4 if spec.keep_fp32 else FULL_BYTES)
            if spec.role in ("matrix", "lookup"):
                kept[spec.name.removesuffix(".weight").rpartition(".")[2]] = None
    full = rest + elements * FULL_BYTES
    return QuantizedSize(matrices, elements, total, full, rest + matrix_bytes, matrix_bytes, tuple(kept))


def packed_bytes(spec: ParamSpec, scheme: WeightScheme) -> int:
    """Of the packed rows of a parameter and of its steps in fp32."""
    *stack, rows, width = spec.shape
    stacked = math.prod(stack) * rows
    steps = {
        "tensor": math.prod(stack) * (len(spec.parts) or 1),
        "channel": stacked,
        "group": stacked * (width // scheme.group_size),
    }[scheme.granularity]
    return stacked * -(-width * scheme.bits // 8) + steps * 4 * (2 if scheme.asymmetric else 1)


class WeightStatistics:
    """Numbers of all quantized weights of a model; of codes also what has changed since they were last asked for."""

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}

    @torch.no_grad()
    def sums(self, model: nn.Module, ctx: ParallelContext) -> list[float]:
        """What :meth:`metrics` needs, of the shards that this rank counts; they add up over all ranks. The first
        product after an update would renew the steps: so may this. Collective."""
        totals = torch.zeros(7, dtype=torch.float64)
        for _, layer, op in quantized_layers(model):
            if op.weights is None:
                continue
            weight, spec = layer.matrix.detach(), spec_of(layer.weight)
            codes, scale = op.codes(weight)
            before, self._codes[spec.name] = self._codes.get(spec.name), codes
            if not spec.is_first_copy(ctx):
                continue
            error = weight_values(codes, scale, op.weights).sub_(weight)
            beyond = op.weights.view(weight).abs() > scale.step * (op.weights.largest_code + 0.5)
            flips = 0 if before is None else (codes != before).sum()
            known = 0 if before is None else codes.numel()
            step = scale.step.expand(op.weights.view(weight).shape).sum(dtype=torch.float64)
            found = (error.double().square().sum(), weight.double().square().sum(), beyond.sum(), step)
            totals += torch.tensor([*map(float, found), codes.numel(), float(flips), known], dtype=torch.float64)
        return totals.tolist()

    @staticmethod
    def metrics(totals: list[float]) -> dict[str, float]:
        """Of the sums over all ranks."""
        error, squares, beyond, step, count, flips, known = totals
        found = {
            "quant_error": math.sqrt(error / squares) if squares else 0.0,
            "quant_saturation": beyond / max(count, 1),
            "quant_step": step / max(count, 1),
        }
        return found | ({"quant_flips": flips / known} if known else {})
