"""``--peft lora``: low-rank adapters (Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732) beside the
matrices that ``--peft-targets`` names; all else is frozen."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

from torch import nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import Linear
from megaforge.peft.adapter import AdaptedOp, Adapter, Factors
from megaforge.peft.freeze import freeze_all, thaw
from megaforge.peft.targets import Target, chosen

_SITES = 1 << 20  # of dropout: beyond those of blocks


Scale = Callable[[ModelConfig, int], float]


def lora(model: nn.Module, ctx: ParallelContext, kind: type[Adapter] = Adapter, scale: Scale | None = None) -> None:
    """The converter.

    Args:
        kind: of the adapters.
        scale: the factor on the output of an adapter, by its rank; None: :func:`scale_of`.

    Raises:
        UserError: ``--peft-targets`` or ``--lora-rank-pattern`` names nothing of a whole model, or a rank is larger
            than the matrix.
    """
    cfg = cast(ModelConfig, model.cfg)
    targets = chosen(model, "--peft-targets", cfg.peft_targets)
    chosen(model, "--lora-rank-pattern", tuple(cfg.lora_ranks))
    freeze_all(model)
    for _, group in groupby(targets, key=lambda target: target.path):
        adapt(list(group), cfg, ctx, kind, scale or scale_of)
    for module in model.modules():
        _tell_of_dropout(module)
    train_biases(model, cfg.lora_bias)


def adapt(
    targets: Sequence[Target], cfg: ModelConfig, ctx: ParallelContext, kind: type[Adapter], scale: Scale
) -> Adapter:
    """Puts an adapter beside the layer that all ``targets`` are of."""
    layer, path = targets[0].layer, targets[0].path
    factors = [_factors(target, cfg, scale) for target in targets]
    block = int(path.split(".")[1]) if path.startswith("layers.") else -1
    site = (block, _SITES + zlib.crc32(path.partition(".")[2].encode()))
    adapter = kind(layer, factors, ctx, rate=cfg.adapter_dropout, site=site)
    layer.add_module("lora", adapter)
    layer.op = AdaptedOp(layer.op, adapter)
    return adapter


def _factors(target: Target, cfg: ModelConfig, scale: Scale) -> Factors:
    rank, flag = cfg.lora_rank, f"--lora-rank {cfg.lora_rank}"
    for pattern, other in cfg.lora_ranks.items():  # the last that names it holds
        if target.matches(pattern):
            rank, flag = other, f"--lora-rank-pattern {pattern}={other}"
    start, stop = target.rows
    if rank > min(stop - start, target.layer.in_features):
        raise UserError(
            f"{flag}: the matrix {target.name} is {stop - start} x {target.layer.in_features}; use at most "
            f"{min(stop - start, target.layer.in_features)}"
        )
    return Factors(target.part, rank, scale(cfg, rank), start, stop)


def scale_of(cfg: ModelConfig, rank: int) -> float:
    """The factor on an adapter's output in LoRA."""
    return cfg.lora_alpha / (math.sqrt(rank) if cfg.use_rslora else rank)


def adapters(model: nn.Module) -> Iterator[tuple[str, Linear, Adapter]]:
    """Every layer with an adapter: its path, the layer, the adapter."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and isinstance(getattr(module, "lora", None), Adapter):
            yield path, module, cast(Adapter, module.lora)


def _tell_of_dropout(block: nn.Module) -> None:
    """The adapters in a block's sublayers learn the masks of each micro-batch when the sublayer is called."""
    for _, sublayer in getattr(block, "sublayers", ()):
        within = [adapter for _, _, adapter in adapters(sublayer) if adapter.rate]
        if within:
            sublayer.register_forward_pre_hook(_Masks(within))


class _Masks:
    def __init__(self, within: Sequence[Adapter]) -> None:
        self.within = within

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for adapter in self.within:
            adapter.dropout = args[1].dropout


def train_biases(model: nn.Module, which: str) -> None:
    """``--lora-bias``: biases of all layers, of those with adapters, or none, are trained too."""
    with_adapters = {id(layer) for _, layer, _ in adapters(model)}
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if not isinstance(bias, nn.Parameter):
            continue
        if which == "all" or (which == "lora_only" and id(module) in with_adapters):
            thaw(bias)
