"""The mixture-of-experts FFN: which tokens, which experts, there and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.kernels.moe_routing import moe_permute, moe_unpermute
from megaforge.nn.mlp import FFNState, FFNTokenShift, ffn_init, mixed_input
from megaforge.nn.moe.experts import Experts, SharedExpert
from megaforge.nn.moe.router import Router, RouterLosses
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.expert_dispatch import TokenDispatcher
from megaforge.parallel.expert_tokens import make_expert_tokens
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.region import TensorParallelRegion


class MoEFFN(nn.Module):
    """A router, its experts, and the shared expert if there is one; after an RWKV mixer, behind a channel mix."""

    def __init__(
        self,
        ctx: ParallelContext,
        name: str,
        cfg: ModelConfig,
        *,
        layer_index: int,
        num_layers: int,
        channel_mix: bool,
        region: TensorParallelRegion,
        dtype: torch.dtype,
    ) -> None:
        """Raises:
        UserError: the experts do not divide over ep, or their inner width over etp.
        """
        super().__init__()
        if cfg.num_experts % ctx.ep.size:
            raise UserError(f"--num-experts {cfg.num_experts} does not divide by --ep {ctx.ep.size}")
        if cfg.ffn_size % ctx.etp.size:
            raise UserError(f"--ffn-hidden-size {cfg.ffn_size} does not divide by --etp {ctx.etp.size} (default: --tp)")
        mix = {"layer_index": layer_index, "num_layers": num_layers, "dtype": dtype}
        self.mix = FFNTokenShift(ctx, name, cfg, **mix) if channel_mix else None  # type: ignore[arg-type]
        self.share = make_expert_tokens(ctx, region)
        self.router = Router(ctx, f"{name}.router", cfg, self.share, dtype=dtype)
        self.dispatcher = TokenDispatcher(cfg.num_experts, *self.share.expert_axes)
        init = ffn_init(cfg, num_layers, channel_mix)
        self.experts = Experts(ctx, name, cfg, init=init, dtype=dtype)
        self.shared: SharedExpert | None = None
        if cfg.moe_shared_expert_intermediate_size is not None:
            self.shared = SharedExpert(ctx, f"{name}.shared_expert", cfg, init=init, dtype=dtype)

    def forward(self, x: Tensor, info: PackedSequence, state: FFNState | None = None) -> tuple[Tensor, RouterLosses]:
        """Normed residual stream [s(/tp), b, h] -> residual stream [s(/tp), b, h], and the layer's losses."""
        mix = None if self.mix is None else lambda inside: mixed_input(self.mix, inside, info, state)
        own, inside = self.share.enter(x, mix, self.shared is not None)
        routing, losses = self.router.route(own, info)
        tokens, dispatcher = own.flatten(0, 1), self.dispatcher
        plan, position = dispatcher.plan(routing.permutation.counts), routing.permutation.position
        rows, weights = moe_permute(tokens, position, plan.own, routing.weights)
        rows, weights = dispatcher.token_dispatch(rows, weights, plan)
        rows, weights = dispatcher.dispatch_postprocess(rows, weights, plan)
        rows = self.experts(rows, weights, plan.counts)
        rows = dispatcher.combine_preprocess(rows, plan)
        rows = dispatcher.token_combine(rows, plan)
        routed = moe_unpermute(rows, position).view_as(own)
        shared = None if self.shared is None else self.shared(inside)
        return self.share.exit(routed, shared, info.length), losses
