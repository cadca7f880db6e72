"""Feed-forward sublayers: the dense FFN and RWKV's channel mix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.nn.activations import activate
from megaforge.nn.norms import make_sub_norm
from megaforge.nn.sublayer import NOTHING, LayerOutput, LayerState
from megaforge.nn.token_shift import shift_and_mix
from megaforge.parallel.init_rules import Constant, Elementwise, InitRule, Normal, Orthogonal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.parallel.packed_sequence import PackedSequence


def inner_parts(cfg: ModelConfig) -> tuple[int, ...]:
    """Sizes of the logical matrices fused in an FFN's first projection: gate and up, or one."""
    return (cfg.ffn_size,) * (2 if cfg.is_gated else 1)


def ffn_init(layer: LayerContext) -> tuple[InitRule, InitRule]:
    """Initial weights of an FFN's first and second projection.

    After attention GPT-2's rule: normal, the second smaller by 1/sqrt(2 layers). After RWKV-7 the published rule of
    RWKV-LM: the first orthogonal with gain 1 (``--rwkv-init normal``: normal of the same scale), the second zero.
    """
    cfg = layer.cfg
    if not layer.token_shift:
        std = cfg.init_std * cfg.init_std_scale
        return Normal(std), Normal(std / math.sqrt(2 * layer.count))
    gain = cfg.init_std_scale
    if cfg.rwkv_init == "orthogonal":
        return Orthogonal(gain), Constant(0.0)
    return Normal(gain / math.sqrt(max(sum(inner_parts(cfg)), cfg.hidden_size))), Constant(0.0)


@dataclass
class FFNState(LayerState):
    """What a channel mix remembers between calls of generation: its last input, [b, h]."""

    shift: Tensor | None = None


def declare_token_shift(layer: LayerContext) -> nn.Parameter | None:
    """The coefficients x_k [h] of :func:`mixed_input` with RWKV-LM's initial values; None where the block's mixer wants
    no token shift."""
    size, power = layer.cfg.hidden_size, (1 - layer.index / layer.count) ** 4
    if not layer.token_shift:
        return None
    init = Elementwise(lambda channel: 1 - (channel / size) ** power)
    return layer.parameter((size,), init, tp_partial_grad=True, weight_decay=False, keep_fp32=True, kind="rwkv")


def mixed_input(x_k: Tensor | None, x: Tensor, info: PackedSequence, state: FFNState | None) -> Tensor:
    """The FFN's input inside the region [s, b, h]: ``x``, or RWKV-7's mix of each token with its predecessor,
    ``x + (shift(x) - x) * x_k`` (RWKV-LM, x070). ``state`` continues a sequence and takes in the last token."""
    if x_k is None:
        return x
    (mixed,) = shift_and_mix(x, info, None if state is None else state.shift, (x_k,))
    if state is not None:
        state.shift = x[-1].clone()  # a view would keep the whole prompt's
    return mixed


class DenseFFN(nn.Module):
    """Two projections with an activation between, the inner width split over tp; after an RWKV mixer, a channel mix."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        cfg, parts = layer.cfg, inner_parts(layer.cfg)
        self.region = layer.region
        self.activation = cfg.activation
        self.x_k = declare_token_shift(layer)
        first, second = ffn_init(layer)
        options: dict[str, Any] = {"bias": cfg.add_bias_linear, "kind": "ffn"}
        enter = self.x_k is None
        self.up = ColumnParallelLinear(
            layer, cfg.hidden_size, sum(parts), init=first, enter=enter, parts=parts, **options
        )
        self.sub_norm = make_sub_norm(layer, cfg.ffn_size)
        self.down = RowParallelLinear(layer, cfg.ffn_size, cfg.hidden_size, init=second, **options)

    def new_state(self) -> FFNState | None:
        return None if self.x_k is None else FFNState()

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: FFNState | None = None,
    ) -> LayerOutput:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h]."""
        if self.x_k is not None:
            x = mixed_input(self.x_k, self.region.enter(x), info, state)
        return LayerOutput(self.down(self.sub_norm(activate(self.activation, self.up(x)))))
