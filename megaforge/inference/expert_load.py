"""How a trained model's experts are used on a text: layer by layer, and what full ones leave out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import nn

from megaforge.config.expert_layers import ExpertLayers
from megaforge.inference.evaluation import Stream, window_batch
from megaforge.inference.restore import TrainedModel
from megaforge.nn.mixture_of_depths import MixtureOfDepths
from megaforge.nn.moe import Router
from megaforge.training.expert_balance import entropy_bits, greatest_loads, overflow


@dataclass(frozen=True)
class ExpertLoad:
    """The experts of one layer.

    Attributes:
        layer: its name, as :class:`megaforge.config.expert_layers.ExpertLayers` has it.
        experts: how many there are.
        entropy_bits: of their shares of the assignments; log2 of their number when all get alike.
        busiest: assignments of the busiest one over the mean.
        capacity_used: share of the places that experts have for a sequence's tokens which were taken; None: there is no
            limit.
        overflow: share of the assignments that full experts left out.
    """

    layer: str
    experts: int
    entropy_bits: float
    busiest: float
    capacity_used: float | None
    overflow: float


@dataclass(frozen=True)
class ExpertUse:
    """What :func:`expert_use` found.

    Attributes:
        windows: sequences that were looked at.
        tokens: of each.
        capacity_factor: at which experts were full; None: never.
        overflow: share of the assignments of all layers together that full experts left out.
        layers: those that routed any.
    """

    windows: int
    tokens: int
    capacity_factor: float | None
    overflow: float
    layers: list[ExpertLoad]


@torch.no_grad()
def expert_use(
    trained: TrainedModel,
    stream: Stream,
    *,
    seq_length: int,
    batch_size: int,
    windows: int,
    capacity_factor: float | None = None,
) -> ExpertUse:
    """Routes whole windows of a text as training does: experts are full at their capacity, and Mixture of Depths takes
    each sequence's highest tokens. Collective; dp ranks share the windows.

    Args:
        windows: so many at most, spread evenly over the text.
        capacity_factor: in place of the one of training.
    """
    model, ctx, cfg = trained.model, trained.ctx, trained.config.model
    factor = cfg.moe_expert_capacity_factor if capacity_factor is None else capacity_factor
    whole = (len(stream.tokens) - 1) // seq_length
    taken = min(windows, whole)
    starts = [number * whole // taken * seq_length for number in range(taken)]
    batches = [starts[first : first + batch_size] for first in range(0, taken, batch_size)]
    layers = ExpertLayers.of(cfg)
    counts = torch.zeros((3, len(layers.names), max(layers.experts)), dtype=torch.float64, device=ctx.device)
    with _as_in_training(model.chunk, factor):
        for _, group in groupby(batches[ctx.dp.rank :: ctx.dp.size], len):
            alike = list(group)
            for first in range(0, len(alike), ctx.pp.size):
                chosen = [window_batch(stream, own, seq_length) for own in alike[first : first + ctx.pp.size]]
                counts[:, model.chunk.moe_rows] += model.expert_counts(chosen)
    for axis in (ctx.dp, ctx.pp):
        if axis.group is not None:
            dist.all_reduce(counts, group=axis.group)
    assigned, _, kept = counts
    used = [number for number, total in enumerate(assigned.sum(1).tolist()) if total]
    left_out = float(overflow(assigned.flatten(), kept.flatten()))
    own = dataclasses.replace(
        layers, names=tuple(layers.names[n] for n in used), experts=tuple(layers.experts[n] for n in used)
    )
    return ExpertUse(taken, seq_length, factor, left_out, _loads(assigned[used], kept[used], own, taken, factor))


def _loads(
    assigned: torch.Tensor, kept: torch.Tensor, layers: ExpertLayers, sequences: int, factor: float | None
) -> list[ExpertLoad]:
    columns = zip(
        layers.names,
        layers.experts,
        entropy_bits(assigned).tolist(),
        greatest_loads(assigned, layers.experts).tolist(),
        _capacity_used(assigned.sum(1).tolist(), kept.sum(1).tolist(), layers.experts, sequences, factor),
        overflow(assigned, kept).tolist(),
        strict=True,
    )
    return [ExpertLoad(*row) for row in columns]


def _capacity_used(
    assigned: Sequence[float], kept: Sequence[float], experts: Sequence[int], sequences: int, factor: float | None
) -> list[float | None]:
    if factor is None:
        return [None] * len(experts)
    # As megaforge.nn.moe.routing.expert_capacity; rounded, for a product of other order may lie just above.
    places = [math.ceil(round(factor * a / sequences / e, 9)) for a, e in zip(assigned, experts, strict=True)]
    return [k / (sequences * e * place) for k, e, place in zip(kept, experts, places, strict=True)]


@contextmanager
def _as_in_training(model: nn.Module, factor: float | None) -> Iterator[None]:
    """What chooses tokens and experts does so as in training, and nothing else."""
    choosing = [module for module in model.modules() if isinstance(module, Router | MixtureOfDepths)]
    before = [(module, module.training, getattr(module, "cfg", None)) for module in choosing]
    try:
        for module in choosing:
            module.training = True
            if isinstance(module, Router):
                module.cfg = dataclasses.replace(module.cfg, moe_expert_capacity_factor=factor)
        yield
    finally:
        for module, training, cfg in before:
            module.training = training
            if isinstance(module, Router) and cfg is not None:
                module.cfg = cfg
