"""Which experts a token goes to, with which weights, and which assignments exceed an expert's capacity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig

_RESOLUTION = 2.0**-12  # to which routing weights are compared when an expert is full
_TINY = 1e-20  # DeepSeek-V3's guard of the normalisation


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dim, in descending order, ties to the lowest index: [..., E] -> [..., k].

    torch.topk promises no order among equals, and experts with equal scores must be chosen alike at every layout.
    """
    scores = scores.detach()
    if k == scores.shape[-1]:
        return scores.argsort(dim=-1, descending=True, stable=True)
    left, chosen = scores.clone(), []
    for _ in range(k):  # argmax returns the first of equals; as fast as topk for the few that are taken
        chosen.append(left.argmax(dim=-1, keepdim=True))
        left.scatter_(-1, chosen[-1], -math.inf)
    return torch.cat(chosen, dim=-1)


def choose_experts(scores: Tensor, cfg: ModelConfig) -> Tensor:
    """The experts of each token: the top k of its scores, [..., E] -> int64 [..., k].

    With ``--moe-router-num-groups`` only experts in the ``--moe-router-group-topk`` best groups of neighbours can be
    chosen; a group is as good as the sum of its best ``topk / group_topk`` experts (DeepSeek-V3, arXiv 2412.19437).
    """
    if cfg.moe_router_num_groups is None or cfg.moe_router_group_topk is None:
        return largest(scores, cfg.moe_router_topk)
    grouped = scores.detach().unflatten(-1, (cfg.moe_router_num_groups, -1))
    best = grouped.topk(cfg.moe_router_topk // cfg.moe_router_group_topk, dim=-1).values.sum(dim=-1)
    groups = largest(best, cfg.moe_router_group_topk)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, groups, True)
    return largest(grouped.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2), cfg.moe_router_topk)


def route(logits: Tensor, expert_bias: Tensor | None, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses and weighs experts.

    Args:
        logits: [..., E].
        expert_bias: [E], added to the scores for the choice only; None: nothing.

    Returns:
        weights [..., k] and experts int64 [..., k], best first; and each expert's probability [..., E], as the
        load-balancing loss reads it. Softmax: the weights are the chosen probabilities, renormalised to one (which is
        the softmax of the chosen logits). Sigmoid: the chosen scores, renormalised to one if there are several; the
        probability is a score's share of all scores (DeepSeek-V3, arXiv 2412.19437).
    """
    softmax = cfg.moe_router_score_function == "softmax"
    scores = logits if softmax else logits.sigmoid()
    experts = choose_experts(scores if expert_bias is None else scores.detach() + expert_bias, cfg)
    weights = scores.gather(-1, experts)
    if softmax:
        weights, probability = weights.softmax(dim=-1), scores.softmax(dim=-1)
    else:
        probability = scores / (scores.sum(dim=-1, keepdim=True) + _TINY)
        if cfg.moe_router_topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + _TINY)
    if cfg.moe_router_topk_scaling_factor is not None:
        weights = weights * cfg.moe_router_topk_scaling_factor
    return weights, experts, probability


def count_per_sequence(experts_SBK: Tensor, number: int) -> Tensor:
    """Assignments of each sequence to each expert: int64 [s, b, k] -> [b, E]."""
    batch = experts_SBK.shape[1]
    slot = _slot(experts_SBK, number).flatten()
    return slot.new_zeros(batch * number).scatter_add_(0, slot, torch.ones_like(slot)).view(batch, number)


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
