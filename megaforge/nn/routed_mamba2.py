"""Routing Mamba ("RoM": Zhan et al., arXiv 2506.18145) on Mamba-2: experts of projections around one state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megaforge.kernels.grouped_mm import make_runs
from megaforge.kernels.moe_routing import moe_permute, moe_unpermute
from megaforge.nn.mamba2 import Mamba2Core, Mamba2State
from megaforge.nn.moe.router import Router
from megaforge.nn.sublayer import NOTHING, LayerOutput
from megaforge.parallel.expert_columns import ColumnDispatcher
from megaforge.parallel.expert_tokens import make_expert_tokens
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ColumnParallelLinear, GroupedLinear
from megaforge.parallel.packed_sequence import PackedSequence


class RoutedMamba2Mixer(Mamba2Core):
    """A Mamba-2 layer with experts for the projections of z (the gate), of x (what the convolution takes in) and out.

    One router chooses a token's experts for all three, so that they are trained together: z and x are the sums of what
    the chosen ones make of the token, what is projected out is weighted as the router says. B, C, dt, the convolution,
    A and D are the same for all, so that there is one state trajectory.

    Heads are split over tp, experts over ep, and their width, which is that of all heads, over etp: between the two the
    ranks of tp exchange tokens for heads, unless experts are laid out as the heads are.
    """

    def __init__(self, layer: LayerContext) -> None:
        """``layer.cfg`` has the number of experts and of those that a token goes to as this layer has them."""
        super().__init__(layer)
        cfg = layer.cfg
        hidden, heads, inner = cfg.hidden_size, cfg.mamba_heads, cfg.mamba_heads * cfg.mamba_head_dim
        shared = cfg.mamba_num_groups * cfg.mamba_state_dim
        self.share = make_expert_tokens(layer.ctx, layer.region)
        self.router = Router(layer, self.share)
        self.dispatcher = ColumnDispatcher(cfg.num_experts, *self.share.expert_axes)
        std, parts = cfg.init_std * cfg.init_std_scale, (shared, shared, heads)
        declared: dict[str, Any] = {"parts": parts, "kind": "mamba", "bias": cfg.add_bias_linear}
        self.input = ColumnParallelLinear(layer, hidden, sum(parts), init=Normal(std), **declared)
        fused: dict[str, Any] = {"parts": (inner, inner), "kind": "mamba"}
        self.expert_input = GroupedLinear(layer, hidden, 2 * inner, init=Normal(std), split=1, **fused)
        init = Normal(std / math.sqrt(2 * layer.count))
        self.output = GroupedLinear(layer, inner, hidden, init=init, split=2, kind="mamba")

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: Mamba2State | None = None,
    ) -> LayerOutput:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h], and the router's losses; see
        :meth:`Mamba2Core.mix`."""
        own, inside = self.share.enter(x, None, True)
        assert inside is not None
        routing, losses = self.router.route(own, info)
        tokens, dispatcher, position = own.flatten(0, 1), self.dispatcher, routing.permutation.position
        plan = dispatcher.plan(routing.permutation.counts, routing.rows)

        rows, weights = moe_permute(tokens, position, plan.own, routing.weights)
        rows, weights = dispatcher.token_dispatch(rows, weights, plan)
        rows, weights = dispatcher.dispatch_postprocess(rows, weights, plan)
        runs = make_runs(plan.counts, rows.device)
        made = self.expert_input(rows, runs).unflatten(-1, (2, -1))  # z, x; the indicator weighs each with 1
        made = moe_unpermute(dispatcher.rows_from_columns(made, plan).flatten(1), position)
        made = self.share.to_heads(made.view(*own.shape[:2], 2, -1), info.length)
        z, taken = made.unbind(-2)

        b_c, step = self.input(inside).split((2 * self.shared, self.heads), dim=-1)
        y = self.mix(z, torch.cat([taken, b_c], -1), step, info, state)

        rows, _ = moe_permute(self.share.from_heads(y).flatten(0, 1), position, plan.own)
        rows = dispatcher.columns_from_rows(rows, plan)
        rows = self.output(rows * weights.to(rows.dtype).unsqueeze(1), runs)
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows, plan), plan)
        routed = moe_unpermute(rows, position).view_as(own)
        return LayerOutput(self.share.exit(routed, None, info.length), losses=losses)
