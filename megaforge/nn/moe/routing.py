"""How the configuration routes, and which assignments exceed an expert's capacity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.moe_routing import RoutingRule

_RESOLUTION = 2.0**-12  # to which routing weights are compared when an expert is full


def routing_rule(cfg: ModelConfig) -> RoutingRule:
    """The router's flags, as the kernel takes them."""
    factor = cfg.moe_router_topk_scaling_factor
    return RoutingRule(
        cfg.moe_router_topk,
        cfg.moe_router_score_function,
        cfg.moe_router_pre_softmax,
        num_groups=cfg.moe_router_num_groups,
        group_topk=cfg.moe_router_group_topk,
        scaling_factor=1.0 if factor is None else factor,
    )


def plain_rule(cfg: ModelConfig) -> RoutingRule | None:
    """The plain top-k of the scores, which the load-balancing loss counts (DeepSeek-V3, arXiv 2412.19437, eq. 18;
    Megatron-LM's ``compute_routing_scores_for_aux_loss``); None where the choice is that already, or nobody counts."""
    differs = cfg.moe_router_enable_expert_bias or cfg.moe_router_num_groups is not None
    if not differs or cfg.moe_router_load_balancing_type == "none":
        return None
    return RoutingRule(cfg.moe_router_topk, cfg.moe_router_score_function)


def expert_capacity(cfg: ModelConfig, length: int) -> int | None:
    """Assignments that an expert takes from one sequence of ``length`` tokens; None: all."""
    if cfg.moe_expert_capacity_factor is None:
        return None
    return math.ceil(cfg.moe_expert_capacity_factor * cfg.moe_router_topk * length / cfg.num_experts)


def within_capacity(experts_SBK: Tensor, weights_SBK: Tensor, number: int, capacity: int, policy: str) -> Tensor:
    """Which assignments are kept when each expert takes at most ``capacity`` from each sequence.

    Args:
        experts_SBK, weights_SBK: of all S tokens of each sequence, in order.
        number: experts.
        policy: ``position`` keeps the first, so that a token's fate depends on earlier tokens only; ``probs`` those
            of the largest weight, which looks ahead. Weights that agree to 2^-12 go by position: equal tokens at the
            beginnings of packed documents have equal weights, and rounding must not choose between them.

    Returns:
        Bool [S, b, k].
    """
    slot = _slot(experts_SBK, number).flatten()
    order = torch.arange(slot.numel(), device=slot.device)
    if policy == "probs":
        order = (weights_SBK.detach().flatten() / _RESOLUTION).round().argsort(descending=True, stable=True)
    order = order[slot[order].argsort(stable=True)]
    in_order = slot[order]
    place = torch.arange(slot.numel(), device=slot.device) - torch.searchsorted(in_order, in_order)
    kept = torch.empty_like(slot, dtype=torch.bool)
    kept[order] = place < capacity
    return kept.view_as(experts_SBK)


def _slot(experts_SBK: Tensor, number: int) -> Tensor:
    """One number for each pair of sequence and expert."""
    return experts_SBK + number * torch.arange(experts_SBK.shape[1], device=experts_SBK.device)[:, None]
