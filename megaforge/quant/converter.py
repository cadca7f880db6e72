"""``--quantize-weights``: gives the matrices of a model, as ``--bitnet-layers`` chooses them, ops that quantize."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

import torch
from torch import nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import Linear, is_whole, linears
from megaforge.parallel.param_spec import ParamSpec, spec_of
from megaforge.quant.linear import QuantizedLinear
from megaforge.quant.quantizers import ActivationScheme, WeightScheme
from megaforge.quant.ranges import make_ranges
from megaforge.quant.scales import ModelScales, ScaleSource, WholeMatrix

SCALE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weight_scheme(cfg: ModelConfig) -> WeightScheme | None:
    """As the flags say; None: weights stay as they are."""
    if cfg.quantize_weights is None:
        return None
    kept = SCALE_TYPES[cfg.quant_scale_dtype]
    asymmetric = cfg.asymmetric_weights
    return WeightScheme(cfg.quantize_weights, cfg.quant_granularity, cfg.quant_group_size, asymmetric, kept)


def activation_scheme(cfg: ModelConfig) -> ActivationScheme | None:
    """As the flags say; None: activations stay as they are."""
    kind = cfg.activation_kind
    return None if kind is None else ActivationScheme({"int8": 8, "int4": 4}[kind], cfg.asymmetric_activations)


def can_be_quantized(layer: Linear) -> bool:
    """Whether it multiplies by a matrix that update rules of matrices take: not the head, a router, or a low-rank map,
    which are declared otherwise."""
    spec = spec_of(layer.weight)
    return spec.role == "matrix" and spec.update == "matrix" and not layer.transposed


def is_chosen(path: str, kind: str, patterns: Sequence[str]) -> bool:
    """Whether ``--bitnet-layers`` names a layer: by ``all``, its kind (attention, rwkv, mamba, ffn, moe), its path or
    the end of it, with * and ?."""
    names = path.split(".")
    ends = [".".join(names[start:]) for start in range(len(names))]
    return any(pattern in ("all", kind) or any(fnmatchcase(end, pattern) for end in ends) for pattern in patterns)


def chosen_layers(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, Linear]]:
    """The layers of ``model`` that ``--bitnet-layers`` names and that can be quantized, with their paths."""
    able = [(path, layer) for path, layer in linears(model) if can_be_quantized(layer)]
    return [(path, layer) for path, layer in able if is_chosen(path, spec_of(layer.weight).kind, patterns)]


def bitnet(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter.

    Raises:
        UserError: ``--bitnet-layers`` names nothing of a whole model, or a width does not fit.
    """
    cfg = cast(ModelConfig, model.cfg)
    weights, activations = weight_scheme(cfg), activation_scheme(cfg)
    if weights is None and activations is None:
        raise UserError("--converters bitnet: it quantizes nothing: add --quantize-weights ternary")
    layers = chosen_layers(model, cfg.bitnet_layers)
    if cfg.bitnet_layers != ("all",) and is_whole(model):
        _check_patterns(model, cfg.bitnet_layers)
    scales = None if weights is None else ModelScales(weights, ctx)
    for path, layer in layers:
        spec = spec_of(layer.weight)
        rows_are_split = spec.shard_dim == len(spec.shape) - 1
        width = layer.in_features // (ctx.axis(spec.shard_axis).size if rows_are_split else 1)
        if weights is not None and weights.granularity == "group":
            _check_divides("--quant-group-size", cfg.quant_group_size, width, path)
        rotation = cfg.hadamard if rows_are_split else 0
        if rotation:
            _check_divides("--hadamard", rotation, width, path)
        source: ScaleSource | None = None
        if weights is not None and scales is not None:
            whole = weights.granularity == "tensor"
            source = scales.add(layer.weight) if whole else WholeMatrix(weights, partial(_spec, layer), ctx)
        ranges = make_ranges(layer, cfg, ctx)
        if ranges is not None:
            layer.ranges = ranges
        layer.op = QuantizedLinear(
            weights, activations, source, layer=layer, noise=cfg.quant_noise, rotation=rotation, ranges=ranges
        )


def _spec(layer: Linear) -> ParamSpec:
    return spec_of(layer.weight)


def _check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    able = {path: spec_of(layer.weight).kind for path, layer in linears(model) if can_be_quantized(layer)}
    for pattern in patterns:
        if not any(is_chosen(path, kind, [pattern]) for path, kind in able.items()):
            kinds = ", ".join(dict.fromkeys(able.values()))
            ends = ", ".join(dict.fromkeys(".".join(path.split(".")[2:]) for path in able))
            raise UserError(
                f"--bitnet-layers {pattern}: no matrix of this model that can be quantized has such a kind or path; "
                f"use all, a kind ({kinds}), or what a path ends with ({ends}), with * and ?"
            )


def _check_divides(flag: str, size: int, width: int, path: str) -> None:
    if width % size:
        raise UserError(
            f"{flag} {size}: it does not divide the {width} input features that a rank has of {path}; use a power of "
            f"two that does, up to {width & -width}"
        )
