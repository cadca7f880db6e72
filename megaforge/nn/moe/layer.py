"""The mixture-of-experts FFN: which tokens, which experts, there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from megaforge.kernels.grouped_mm import make_runs
from megaforge.kernels.moe_routing import moe_permute, moe_unpermute
from megaforge.nn.activations import activate, activate_weighted
from megaforge.nn.mlp import FFNState, declare_token_shift, ffn_init, inner_parts, mixed_input
from megaforge.nn.moe.experts import SharedExpert
from megaforge.nn.moe.router import Router
from megaforge.nn.norms import ExpertSubNorm
from megaforge.nn.sublayer import NOTHING, LayerOutput
from megaforge.parallel.expert_dispatch import TokenDispatcher
from megaforge.parallel.expert_tokens import make_expert_tokens
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import GroupedLinear
from megaforge.parallel.packed_sequence import PackedSequence


class MoEFFN(nn.Module):
    """A router, its experts, and the shared expert if there is one; after an RWKV mixer, behind a channel mix.

    This rank has E/ep of the experts, their inner width split over etp.
    """

    def __init__(self, layer: LayerContext) -> None:
        super().__init__()
        cfg, ctx = replace(layer.cfg, ffn_hidden_size=layer.cfg.expert_ffn_size), layer.ctx
        layer = replace(layer, cfg=cfg)
        self.activation = cfg.activation
        self.x_k = declare_token_shift(layer)
        self.share = make_expert_tokens(ctx, layer.region)
        self.router = Router(layer, self.share)
        self.dispatcher = TokenDispatcher(cfg.num_experts, *self.share.expert_axes)
        init, parts = ffn_init(layer), inner_parts(cfg)
        self.up = GroupedLinear(layer, cfg.hidden_size, sum(parts), init=init[0], split=1, parts=parts)
        self.sub_norm = ExpertSubNorm(layer, cfg.ffn_size) if cfg.sub_norm else None
        self.down = GroupedLinear(layer, cfg.ffn_size, cfg.hidden_size, init=init[1], split=2)
        self.shared_expert: SharedExpert | None = None
        if cfg.moe_shared_expert_intermediate_size is not None:
            self.shared_expert = SharedExpert(layer, init)

    def new_state(self) -> FFNState | None:
        return None if self.x_k is None else FFNState()

    def forward(
        self,
        x: Tensor,
        info: PackedSequence,
        carried: Mapping[str, Tensor] = NOTHING,
        state: FFNState | None = None,
    ) -> LayerOutput:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h], and the layer's losses."""
        mix = None if self.x_k is None else lambda inside: mixed_input(self.x_k, inside, info, state)
        own, inside = self.share.enter(x, mix, self.shared_expert is not None)
        routing, losses = self.router.route(own, info)
        tokens, dispatcher = own.flatten(0, 1), self.dispatcher
        plan, position = dispatcher.plan(routing.permutation.counts, routing.rows), routing.permutation.position
        rows, weights = moe_permute(tokens, position, plan.own, routing.weights)
        rows, weights = dispatcher.token_dispatch(rows, weights, plan)
        rows, weights = dispatcher.dispatch_postprocess(rows, weights, plan)
        rows = self.experts(rows, weights, plan.counts)
        rows = dispatcher.combine_preprocess(rows, plan)
        rows = dispatcher.token_combine(rows, plan)
        routed = moe_unpermute(rows, position).view_as(own)
        shared = None if self.shared_expert is None else self.shared_expert(inside)
        return LayerOutput(self.share.exit(routed, shared, info.length), losses=losses)

    def experts(self, rows: Tensor, weights: Tensor, counts: tuple[int, ...] | Tensor) -> Tensor:
        """Rows [R, h] sorted by expert and their routing weights [R] -> weighted partial sums over etp [R, h]."""
        runs = make_runs(counts, rows.device)
        inner = self.up(rows, runs)
        # The routing weight goes in front of the second projection: its gradient then needs no saved expert output.
        if self.sub_norm is None:
            return self.down(activate_weighted(self.activation, inner, weights), runs)
        inner = self.sub_norm(activate(self.activation, inner), runs)
        return self.down(inner * weights.to(inner.dtype).unsqueeze(1), runs)
