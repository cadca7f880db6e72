"""Quantized linear layers for any PyTorch model: ``BitNetLinear`` in place of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megaforge.errors import UserError
from megaforge.quant.converter import is_chosen
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.quantizers import ActivationScheme, WeightScheme
from megaforge.quant.scales import WholeMatrix


class BitNetLinear(nn.Linear):
    """``nn.Linear`` whose product sees quantized weights and activations; gradients go straight through.

    Weights and bias keep their names and types, so that a state of ``nn.Linear`` loads. Under ``torch.autocast`` the
    product is in its type.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: str = "binary",
        activation_bits: int | None = 8,
    ) -> None:
        """
        Args:
            weights: one of :data:`megaforge.quant.quantizers.SCHEMES`.
            activation_bits: 8 or 4; None leaves activations as they are.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        scheme = WeightScheme(weights)
        activations = None if activation_bits is None else ActivationScheme(activation_bits)
        self.op = QuantizedLinear(scheme, activations, WholeMatrix(scheme), layer=self)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        self.op.forget()  # nobody tells when an optimizer has changed the weights
        return self.op.apply(input, weight, bias)

    def extra_repr(self) -> str:
        assert self.op.weights is not None
        bits = None if self.op.activations is None else self.op.activations.bits
        return f"{super().extra_repr()}, weights={self.op.weights.kind}, activation_bits={bits}"


@dataclass
class ConversionReport:
    """What :func:`convert_model_to_bitnet` did, by the paths of linear layers.

    Attributes:
        converted: what each has become.
        kept: why each has stayed.
    """

    converted: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(f"{path}: {text}" for path, text in [*self.converted.items(), *self.kept.items()])


def convert_model_to_bitnet(
    model: nn.Module, layers: str | Sequence[str] = "all", *, weights: str = "binary", activation_bits: int | None = 8
) -> ConversionReport:
    """Puts a :class:`BitNetLinear` in the place of each ``nn.Linear`` of ``model`` that ``layers`` names. They share
    weights and biases with what they replace, so that an optimizer made before goes on with them.

    Args:
        layers: "all", or paths in the model and ends of them, with * and ?.
        weights, activation_bits: as in :class:`BitNetLinear`.

    Raises:
        UserError: a pattern names no linear layer, or ``model`` itself is one, which cannot be replaced in place.
    """
    if isinstance(model, nn.Linear):
        raise UserError("convert_model_to_bitnet replaces layers in a model; a single nn.Linear has none around it")
    patterns = [layers] if isinstance(layers, str) else list(layers)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if not any(is_chosen(path, "", [pattern]) for path, _ in found):
            paths = ", ".join(path for path, _ in found) or "none"
            raise UserError(f"convert_model_to_bitnet: {pattern!r} names no linear layer; there are {paths}")
    report = ConversionReport()
    for path, old in found:
        if not is_chosen(path, "", patterns):
            report.kept[path] = "not named"
        elif type(old) is not nn.Linear:
            report.kept[path] = f"a {type(old).__name__}, not a plain nn.Linear"
        else:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _converted(old, weights, activation_bits))
            read = "as they are" if activation_bits is None else f"int{activation_bits}"
            report.converted[path] = f"{weights}, activations {read}"
    return report


def _converted(old: nn.Linear, weights: str, activation_bits: int | None) -> BitNetLinear:
    new = BitNetLinear(
        old.in_features,
        old.out_features,
        old.bias is not None,
        "meta",
        weights=weights,
        activation_bits=activation_bits,
    )
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)
