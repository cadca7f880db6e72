"""What :mod:`megaforge.kernels.moe_routing` computes, in plain torch: the oracle of the compiled code, and what
runs where there is none. Everything is deterministic, and gradients are gathered, never added up atomically."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-20  # DeepSeek-V3's guard of the normalisation


@dataclass(frozen=True)
class RoutingRule:
    """How a token's logits become experts and weights.

    Attributes:
        topk: experts a token goes to.
        score_function: ``softmax`` or ``sigmoid`` (DeepSeek-V3, arXiv 2412.19437).
        pre_softmax: weights are the chosen experts' probabilities among all experts; else they are renormalised to
            one, which is the softmax of the chosen logits. Read for softmax only.
        num_groups, group_topk: only experts in the ``group_topk`` best of ``num_groups`` groups of neighbours can be
            chosen; a group is as good as the sum of the ``topk / group_topk`` best of what experts are chosen by:
            logits, probabilities (``pre_softmax``) or sigmoids with their bias. None: every expert.
        scaling_factor: on the weights.
    """

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float = 1.0


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


def choose_experts(scores: Tensor, rule: RoutingRule) -> Tensor:
    """The experts of each token, best first, by logits or sigmoids: [..., E] -> int64 [..., k]."""
    if rule.num_groups is None or rule.group_topk is None:
        return largest(scores, rule.topk)
    grouped = scores.detach().unflatten(-1, (rule.num_groups, -1))
    by_probability = rule.pre_softmax and rule.score_function == "softmax"
    worth = scores.detach().softmax(dim=-1).unflatten(-1, (rule.num_groups, -1)) if by_probability else grouped
    best = worth.topk(rule.topk // rule.group_topk, dim=-1).values.sum(dim=-1)
    groups = largest(best, rule.group_topk)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, groups, True)
    return largest(grouped.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2), rule.topk)


def route_scores(logits: Tensor, rule: RoutingRule, experts: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [T, k] of the chosen ``experts``, every expert's probability [T, E]), differentiable in the logits."""
    softmax = rule.score_function == "softmax"
    scores = logits if softmax else logits.sigmoid()
    probability = scores.softmax(dim=-1) if softmax else scores / (scores.sum(dim=-1, keepdim=True) + TINY)
    if softmax and rule.pre_softmax:
        weights = probability.gather(-1, experts)
    elif softmax:
        weights = scores.gather(-1, experts).softmax(dim=-1)
    else:
        weights = scores.gather(-1, experts)
        if rule.topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * rule.scaling_factor, probability


def route_statistics(logits: Tensor, probability: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp [T], sums of probabilities fp64 [sequences, E], sum of squared log-sum-exps fp64 []), of tokens
    that lie [tokens of a sequence, sequences]."""
    lse = logits.logsumexp(dim=-1)
    per_sequence = probability.reshape(len(logits) // sequences, sequences, logits.shape[1])
    return lse, per_sequence.sum(dim=0, dtype=torch.float64), lse.square().sum(dtype=torch.float64)


def count_experts(experts: Tensor, number: int, sequences: int) -> Tensor:
    """Assignments [T, k] of each sequence to each expert: int64 [sequences, E]."""
    sequence = torch.arange(experts.shape[0], device=experts.device) % sequences
    slot = (experts + number * sequence.unsqueeze(1)).flatten().long()
    return slot.new_zeros(sequences * number).scatter_add_(0, slot, torch.ones_like(slot)).view(sequences, number)


def permutation(experts: Tensor, number: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """(position int32 [T, k], counts int64 [number]) of a stable sort of the kept assignments by expert; position -1:
    not kept."""
    flat = (experts if kept is None else torch.where(kept, experts, number)).flatten()
    in_order, order = flat.sort(stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(number + 1, device=flat.device, dtype=flat.dtype))
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    if kept is not None:
        position = torch.where(kept.flatten(), position, -1)
    return position.view(experts.shape).int(), bounds.diff()


def route_backward(
    logits: Tensor,
    experts: Tensor,
    lse: Tensor,
    dweights: Tensor | None,
    dlse: Tensor | None,
    dprobability_sum: Tensor | None,
    dz_sum: Tensor | None,
    rule: RoutingRule,
) -> Tensor:
    """The gradient of :func:`route_scores` and :func:`route_statistics` with respect to the logits [T, E]."""
    softmax = (logits - lse.unsqueeze(1)).exp()
    along = torch.zeros_like(lse) if dlse is None else dlse.clone()
    if dz_sum is not None:
        along += 2 * lse * dz_sum.to(lse.dtype)
    out = softmax * along.unsqueeze(1)
    sigmoid = rule.score_function == "sigmoid"
    scores = logits.sigmoid() if sigmoid else softmax
    slope = scores * (1 - scores)
    if dprobability_sum is not None:
        upstream = dprobability_sum.to(logits.dtype).repeat(logits.shape[0] // len(dprobability_sum), 1)
        total = scores.sum(dim=-1, keepdim=True) + TINY if sigmoid else torch.ones_like(along).unsqueeze(1)
        centred = upstream - (upstream * scores / total).sum(dim=-1, keepdim=True)
        out += slope * centred / total if sigmoid else softmax * centred
    if dweights is None:
        return out
    index, factor = experts.long(), rule.scaling_factor
    weights, _ = route_scores(logits, rule, index)
    if not sigmoid:
        whole = (dweights * weights).sum(dim=-1, keepdim=True)
        if rule.pre_softmax:
            out -= softmax * whole
            return out.scatter_add(1, index, dweights * weights)
        return out.scatter_add(1, index, weights * (dweights - whole / factor))
    chosen = dweights * factor
    if rule.topk > 1:
        total = scores.gather(1, index).sum(dim=-1, keepdim=True) + TINY
        chosen = (chosen - (dweights * weights).sum(dim=-1, keepdim=True)) / total
    return out.scatter_add(1, index, chosen * slope.gather(1, index))


def permute(x: Tensor, position: Tensor, rows: int) -> Tensor:
    """Row t of ``x`` [T, ...] to each of the rows position[t] of the result [rows, ...]; position -1 goes nowhere."""
    flat = position.flatten()
    source = torch.arange(flat.numel(), device=x.device) // max(position.shape[1], 1)
    token = source.new_zeros(rows + 1)  # the last one takes in what goes nowhere
    token[torch.where(flat < 0, rows, flat).long()] = source
    return x.index_select(0, token[:rows])


def unpermute(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over j of weights[t, j] * y[position[t, j]]: [rows, h] -> [T, h]; without weights the plain sum."""
    parts = _picked(y, position)
    if weights is None:
        return parts.sum(dim=1)
    wide = torch.promote_types(y.dtype, weights.dtype)
    return (parts.to(wide) * weights.to(wide).unsqueeze(-1)).sum(dim=1).to(y.dtype)


def unpermute_backward(
    grad: Tensor, y: Tensor | None, position: Tensor, weights: Tensor | None, rows: int
) -> tuple[Tensor, Tensor | None]:
    """(dy [rows, h], dweights [T, k]) of :func:`unpermute`, from the gradient [T, h] of its result."""
    dy = permute(grad, position, rows)
    if weights is None or y is None:
        return dy, None
    wide = torch.promote_types(grad.dtype, weights.dtype)
    dweights = (_picked(y, position).to(wide) * grad.to(wide).unsqueeze(1)).sum(dim=-1)
    row_weights = permute_values(weights, position, rows)
    return (dy.to(wide) * row_weights.to(wide).unsqueeze(1)).to(grad.dtype), dweights.to(weights.dtype)


def permute_values(values: Tensor, position: Tensor, rows: int) -> Tensor:
    """values [T, k], one for each assignment, to its row: [rows]."""
    flat = position.flatten()
    out = values.new_zeros(rows + 1)
    out[torch.where(flat < 0, rows, flat).long()] = values.flatten()
    return out[:rows]


def _picked(y: Tensor, position: Tensor) -> Tensor:
    """[rows, h] -> [T, k, h]; zeros where position is -1."""
    flat = position.flatten()
    if y.shape[0] < flat.numel():
        flat = torch.where(flat < 0, y.shape[0], flat)
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    return y.index_select(0, flat).view(*position.shape, y.shape[1])
