"""The router: scores, choice, losses, and the state that one optimizer step hands to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import expert_layers
from megaforge.kernels.moe_routing import Permutation, Route, moe_permutation, moe_route
from megaforge.nn.losses import LossTerm
from megaforge.nn.moe.routing import expert_capacity, plain_rule, routing_rule, within_capacity
from megaforge.parallel.after_update import Update
from megaforge.parallel.expert_tokens import ReplicatedTokens
from megaforge.parallel.init_rules import Constant, Normal
from megaforge.parallel.layer_context import LayerContext
from megaforge.parallel.layers import ReplicatedLinear
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import spec_of


@dataclass(frozen=True)
class Routing:
    """Where T tokens go.

    Attributes:
        weights: [T, k] in the router's dtype.
        permutation: the order by expert of the assignments that are within their experts' capacity.
        rows: how many these are; None: the host does not know.
    """

    weights: Tensor
    permutation: Permutation
    rows: int | None


@dataclass(frozen=True)
class RouterLosses:
    """What one MoE layer adds to the loss of a micro-batch, as sums, so that no layout enters.

    All three are over the tokens of this cp rank, the same on every tp rank; their sums over dp, cp and micro-batches
    are those of the global batch. Dropped assignments count: they are what the router asked for. What the loss wants
    evened out is the router's own preference, so it counts plain top-k of the scores, whatever bias or groups decide.

    Attributes:
        load_balance_sum: over sequences, of E * sum_e f_e P_e, where P_e is expert e's mean router probability in the
            sequence, and f_e its share of plain top-k choices (Fedus et al., arXiv 2101.03961): in the same sequence,
            or in the previous global batch (see :class:`Router`). 1 when balanced.
        z_loss_sum: over tokens, of the squared log-sum-exp of the router's logits (Zoph et al., arXiv 2202.08906).
        tokens_per_expert: int64 [E], assignments of this micro-batch.
        preferred_per_expert: int64 [E], its choices by plain top-k of the scores; without a bias and groups the same.
        kept_per_expert: int64 [E], those of tokens_per_expert that are within their experts' capacity.
    """

    load_balance_sum: Tensor
    z_loss_sum: Tensor
    tokens_per_expert: Tensor
    preferred_per_expert: Tensor
    kept_per_expert: Tensor

    def counts(self, width: int) -> Tensor:
        """All three counts, int64 [3, width], with zeros behind the layer's experts."""
        all_three = torch.stack([self.tokens_per_expert, self.preferred_per_expert, self.kept_per_expert])
        return F.pad(all_three, (0, width - all_three.shape[1]))

    def terms(self, cfg: ModelConfig) -> dict[str, LossTerm]:
        """By name."""
        layers = len(expert_layers(cfg))
        return {
            "load_balance_loss": LossTerm(self.load_balance_sum, "sequences", cfg.moe_aux_loss_coeff, layers),
            "z_loss": LossTerm(self.z_loss_sum, "tokens", cfg.moe_z_loss_coeff, layers),
        }


class Router(ReplicatedLinear):
    """Top-k of a softmax or of sigmoids. Never in 16 bit.

    What balances the experts' load, by ``--moe-router-load-balancing-type``:

    - ``seq_aux_loss``: E * sum_e f_e P_e with f and P of each sequence.
    - ``global_aux_loss``: f of the global batch, which lets experts specialise (Qiu et al., arXiv 2501.11873). The
      first micro-batch's gradient would need the routing of the last one's. Summing f over what has been seen so far
      would make the model depend on the micro-batch size and on dp, so f is that of the *previous* global batch: a
      tensor of the model that :meth:`after_update` renews and that checkpoints keep. It is 1/E at the beginning, where
      the loss is constant and gives no gradient.
    - ``none``.

    ``--moe-router-enable-expert-bias`` balances without a loss (Wang et al., arXiv 2408.15664): a bias enters the
    choice of experts but not their weights, and moves by a fixed step against each expert's excess load in the global
    batch, after each optimizer step. It too is a tensor of the model that no gradient trains.
    """

    def __init__(self, layer: LayerContext, share: ReplicatedTokens) -> None:
        cfg = layer.cfg
        shape, init = (cfg.num_experts, cfg.hidden_size), Normal(cfg.init_std * cfg.init_std_scale)
        # A rank routes its own tokens, or has partial sums over tp for all: its gradient is partial either way.
        declared: dict[str, Any] = {"role": "matrix", "update": "elementwise", "kind": "router"}
        super().__init__(layer.parameter(shape, init, tp_partial_grad=True, keep_fp32=True, **declared))
        self.cfg, self.share = cfg, share
        self.expert_bias: nn.Parameter | None = None
        self.previous_load: nn.Parameter | None = None
        if cfg.moe_router_enable_expert_bias:
            self.expert_bias = self._state(layer, 0.0)
        if cfg.moe_router_load_balancing_type == "global_aux_loss":
            self.previous_load = self._state(layer, 1 / cfg.num_experts)

    def _state(self, layer: LayerContext, value: float) -> nn.Parameter:
        """A value for each expert that no gradient trains; declared like a parameter, so that checkpoints hold it."""
        shape = (self.cfg.num_experts,)
        state = layer.parameter(shape, Constant(value), weight_decay=False, keep_fp32=True, role="state", kind="router")
        state.requires_grad = False
        return state

    def route(self, x_SBH: Tensor, info: PackedSequence) -> tuple[Routing, RouterLosses]:
        """Routes this rank's tokens.

        Args:
            x_SBH: [own, b, h], as :meth:`ReplicatedTokens.enter` gave them.
            info: the micro-batch's sequences.
        """
        logits = self(x_SBH.to(self.weight.dtype)).flatten(0, 1)
        route = moe_route(logits, routing_rule(self.cfg), self.expert_bias, x_SBH.shape[1])
        permutation = Permutation(route.position, route.counts.sum(dim=0))
        kept = self._kept(route, info)
        if kept is not None:
            permutation = moe_permutation(route.experts, self.cfg.num_experts, kept)
        plain = plain_rule(self.cfg)
        preferred = route.counts if plain is None else moe_route(logits.detach(), plain, None, x_SBH.shape[1]).counts
        rows = route.position.numel() if kept is None else None
        losses = self._losses(route, preferred, None if kept is None else permutation.counts)
        return Routing(route.weights, permutation, rows), losses

    def _kept(self, route: Route, info: PackedSequence) -> Tensor | None:
        """Bool [T, k]; None: all. Decided for whole sequences, on every rank alike: a share of the capacity for each
        rank would make the model depend on the layout. In ``eval`` mode nothing is dropped."""
        if not self.training or self.cfg.moe_expert_capacity_factor is None:
            return None
        shape = (len(route.lse) // len(route.counts), len(route.counts), self.cfg.moe_router_topk)
        experts = self.share.gather(route.experts.long().view(shape), info.positions_S)
        weights = self.share.gather(route.weights.detach().view(shape), info.positions_S)
        capacity = expert_capacity(self.cfg, experts.shape[0])
        assert capacity is not None
        kept = within_capacity(experts, weights, self.cfg.num_experts, capacity, self.cfg.moe_token_drop_policy)
        return self.share.own(kept, info.positions_S).flatten(0, 1)

    def _losses(self, route: Route, preferred: Tensor, kept: Tensor | None) -> RouterLosses:
        """``preferred``: int64 [b, E], choices by plain top-k; ``kept``: int64 [E], those that were not dropped."""
        # One sum over tp for all of them; in fp64 counts stay exact.
        same = preferred is route.counts
        counted = (route.counts,) if same else (route.counts, preferred)
        within = route.z_sum.new_zeros(0) if kept is None else kept.double()
        parts = (torch.stack(counted).double(), route.probability_sum, route.z_sum, within)
        sums = self.share.total(torch.cat([part.flatten() for part in parts]))
        counts, probability_sum, z_sum, within = sums.split([part.numel() for part in parts])
        counts, probability_sum = counts.detach().view_as(parts[0]), probability_sum.view_as(parts[1])
        assigned = counts[0].sum(dim=0).round().long()
        return RouterLosses(
            load_balance_sum=self._load_balance(counts[-1], probability_sum).to(route.lse.dtype),
            z_loss_sum=z_sum.sum().to(route.lse.dtype),
            tokens_per_expert=assigned,
            preferred_per_expert=counts[-1].sum(dim=0).round().long(),
            kept_per_expert=assigned if kept is None else within.detach().round().long(),
        )

    def _load_balance(self, counts: Tensor, probability_sum: Tensor) -> Tensor:
        """E * sum_e f_e P_e, summed over sequences; [b, E] counts and sums of probabilities of this cp rank's tokens.
        P is linear in the tokens, so that cp ranks' values add up."""
        kind, number = self.cfg.moe_router_load_balancing_type, self.cfg.num_experts
        if kind == "none":
            return probability_sum.new_zeros(())
        counts = self.share.sequence_total(counts)
        assignments = counts.sum(dim=1, keepdim=True)
        share = counts / assignments if self.previous_load is None else self.previous_load.double()
        return number * self.cfg.moe_router_topk * (share * probability_sum / assignments).sum()

    def after_update(self, update: Update) -> None:
        """Takes in the finished global batch's counts."""
        super().after_update(update)
        counts = update.expert_counts[self]
        assigned, preferred = (part.to(device=self.weight.device, dtype=torch.float64) for part in counts)
        if self.previous_load is not None:
            self.previous_load.copy_(preferred / preferred.sum())
        if self.expert_bias is not None and not spec_of(self.expert_bias).frozen:
            self.expert_bias.add_((assigned.mean() - assigned).sign(), alpha=self.cfg.moe_router_bias_update_rate)


def expert_counts(model: nn.Module, assigned: Tensor, preferred: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Each router's counts, as :class:`Update` has them.

    Args:
        model: the model, or this rank's stage of it.
        assigned, preferred: [MoE layers of ``model``, E], tokens_per_expert and preferred_per_expert of
            :class:`RouterLosses` summed over micro-batches, dp and cp, in module order; zeros behind a layer's own.

    Raises:
        ValueError: the counts are of another number of layers.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if routers and len(routers) != len(assigned):
        raise ValueError(f"counts of {len(assigned)} MoE layers for a model that has {len(routers)}")
    own = [router.cfg.num_experts for router in routers]
    counts = [(a[:number], p[:number]) for number, a, p in zip(own, assigned, preferred, strict=bool(routers))]
    return dict(zip(routers, counts, strict=True))
