"""A toy mixer, as a user would write one: each token gets the gated mean of its document so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.layer_kind import LayerKind
from megaforge.config.model_config import ModelConfig
from megaforge.nn.sublayer import NOTHING, LayerOutput, LayerState
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.registry import LAYER_KINDS


@dataclass
class Seen(LayerState):
    """The sum of all values [b, h/tp] and how many they are, [b, 1]."""

    total: Tensor | None = None
    count: Tensor | None = None


class RunningMean(nn.Module):
    """The gate is the first such layer's, for all of them."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        size, init = layer.cfg.hidden_size, Normal(0.2)
        self.value = ColumnParallelLinear(layer, size, size, init=init, enter=True)
        self.gate = ColumnParallelLinear(layer, size, size, init=init, enter=True) if layer.first else None
        self.output = RowParallelLinear(layer, size, size, init=init)

    def new_state(self) -> Seen:
        return Seen()

    def forward(
        self, x: Tensor, info: PackedSequence, carried: Mapping[str, Tensor] = NOTHING, state: Seen | None = None
    ) -> LayerOutput:
        value = self.value(x)
        made = NOTHING if self.gate is None else {"mean_gate": torch.sigmoid(self.gate(x))}
        mask = info.attention_mask()
        if state is not None:
            mean = _continued(value, state)
        elif mask is None:
            mean = value.cumsum(0) / torch.arange(1, len(value) + 1, device=x.device).view(-1, 1, 1)
        else:
            shares = mask[:, 0] / mask[:, 0].sum(-1, keepdim=True)
            mean = torch.einsum("bqk,kbc->qbc", shares.to(value.dtype), value)
        return LayerOutput(self.output(mean.to(value.dtype) * {**carried, **made}["mean_gate"]), made)


def _continued(value: Tensor, state: Seen) -> Tensor:
    """[s, b, h/tp], of tokens behind those that ``state`` has seen."""
    if state.total is None or state.count is None:
        state.total, state.count = torch.zeros_like(value[0]), value.new_zeros((value.shape[1], 1))
    places = torch.arange(1, len(value) + 1, device=value.device, dtype=value.dtype).view(-1, 1, 1)
    mean = (state.total + value.cumsum(0)) / (state.count + places)
    state.total, state.count = state.total + value.sum(0), state.count + len(value)
    return mean


class Mean(LayerKind):
    """What the rest of the engine needs to know."""

    title = "running mean"
    kernel = "memory"
    axes = ("tp",)

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        return [(f"--hidden-size {config.model.hidden_size}", config.model.hidden_size)]

    def build(self, layer: Any) -> Any:
        return RunningMean(layer)

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        return 2.0 * cfg.hidden_size

    def carried(self, cfg: ModelConfig, length: int, batch: int, tp: int) -> dict[str, tuple[int, ...]]:
        return {"mean_gate": (length, batch, cfg.hidden_size // tp)}


LAYER_KINDS.register("G", Mean())
