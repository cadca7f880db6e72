"""Converters: what changes a model once it has been built. A quantizer gives its linear layers other ops.

A converter is a function in the registry :data:`megaforge.registry.CONVERTERS`, chosen by ``--converters``::

    def eight_bits(model: nn.Module, ctx: ParallelContext) -> None:
        for path, layer in linears(model):
            if path != "head":
                layer.op = EightBitLinear()
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import nn

from megaforge.config.peft_method import PeftMethod
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import linears as linears
from megaforge.parallel.linear_op import WeightQuantizer, give_quantizer
from megaforge.parallel.param_spec import declare, spec_of
from megaforge.registry import CONVERTERS, PEFT_METHODS


class Converter(Protocol):
    def __call__(self, model: nn.Module, ctx: ParallelContext) -> None:
        """Changes ``model``, a whole one or a pipeline stage, in place. Its parameters have no names and no values yet:
        what they are called and hold follows from the modules that they are in afterwards. A model of the device meta
        is built to be counted, beside the run's own: say nothing of it."""


def convert(
    model: nn.Module,
    names: tuple[str, ...],
    ctx: ParallelContext,
    peft: str | None = None,
    heads: tuple[str, ...] = (),
) -> None:
    """Applies the converters called ``names``, in this order; matrices that they have quantized are declared so. Then
    comes that of ``peft``, which decides what of the model is trained, and those of further ``heads``."""
    for name in names:
        converter: Converter = CONVERTERS.get(name)
        converter(model, ctx)
    for _, layer in linears(model):
        if layer.op.quantizes:
            declare(layer.weight, replace(spec_of(layer.weight), quantized=True))
            give_quantizer(layer.weight, WeightQuantizer(layer.op, layer.transposed))
    if peft is not None:
        method: PeftMethod = PEFT_METHODS.get(peft)
        method.found()(model, ctx)
    for name in heads:
        converter = CONVERTERS.get(name)
        converter(model, ctx)
