"""Routing to experts: from logits to choices, weights, statistics and the order of rows, and the rows there and back.

Each operator (``torch.ops.megaforge.moe_*``) has its definition in :mod:`.reference`, which runs wherever there is no
compiled code (``csrc/moe_routing``). An assignment is a pair of a token and one of its
experts; "rows" are assignments sorted by expert, equal experts in the order of tokens, and ``position`` tells where
each assignment is among them. No implementation depends on the number of threads, not in one bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.kernels.moe_routing.native import COMPILED
from megaforge.kernels.moe_routing.reference import RoutingRule
from megaforge.kernels.native import say_uncompiled

__all__ = ["Permutation", "Route", "RoutingRule", "moe_permutation", "moe_permute", "moe_route", "moe_unpermute"]


class Permutation(NamedTuple):
    """Where assignments go when they are sorted by expert.

    Attributes:
        position: int32 [T, k], the row of each assignment; -1: dropped.
        counts: int64 [E], rows of each expert.
    """

    position: Tensor
    counts: Tensor


class Route(NamedTuple):
    """Everything that a layer needs of T routed tokens.

    Attributes:
        weights: [T, k], in the dtype of the logits.
        experts: int32 [T, k], best first, ties to the lowest index.
        lse: [T], log-sum-exp of the logits.
        position: int32 [T, k]; see :class:`Permutation`. Nothing is dropped.
        counts: int64 [sequences, E], assignments of each sequence to each expert.
        probability_sum: fp64 [sequences, E], over a sequence's tokens, of the experts' probabilities: the softmax of
            the logits, or each sigmoid's share of all.
        z_sum: fp64 [], over tokens, of the squared log-sum-exp.
    """

    weights: Tensor
    experts: Tensor
    lse: Tensor
    position: Tensor
    counts: Tensor
    probability_sum: Tensor
    z_sum: Tensor


def moe_route(logits: Tensor, rule: RoutingRule, expert_bias: Tensor | None = None, sequences: int = 1) -> Route:
    """Chooses and weighs each token's experts, in one pass over the logits.

    Differentiable: ``weights``, ``lse``, ``probability_sum`` and ``z_sum`` with respect to ``logits``.

    Args:
        logits: [T, E], fp32 or fp64. Token t belongs to sequence ``t % sequences``.
        rule: see :class:`RoutingRule`.
        expert_bias: [E], added to sigmoids for the choice only (Wang et al., arXiv 2408.15664).
        sequences: divides T.

    Raises:
        ValueError: a bias for softmax scores.
    """
    if expert_bias is not None and rule.score_function != "sigmoid":
        raise ValueError("a bias of experts is added to sigmoids, not to logits")
    if logits.device.type not in COMPILED:
        say_uncompiled("moe_routing", logits.device.type)
    groups = rule.num_groups is not None and rule.group_topk is not None
    return Route(
        *torch.ops.megaforge.moe_route(
            logits,
            expert_bias,
            sequences,
            rule.topk,
            rule.score_function == "sigmoid",
            rule.pre_softmax,
            rule.num_groups if groups else 0,
            rule.group_topk if groups else 0,
            rule.scaling_factor,
        )
    )


def moe_permutation(experts: Tensor, num_experts: int, kept: Tensor | None = None) -> Permutation:
    """The stable sort by expert, for assignments some of which are dropped.

    Args:
        experts: int32 or int64 [T, k].
        num_experts: E.
        kept: bool [T, k]; None: all.
    """
    return Permutation(*torch.ops.megaforge.moe_permutation(experts, num_experts, kept))


def moe_permute(x: Tensor, position: Tensor, rows: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A copy of each token for each of its experts.

    Args:
        x: [T, h].
        position: int32 [T, k]; all of 0, 1, ..., ``rows`` - 1, once each, and -1 anywhere.
        rows: assignments that are not dropped.
        weights: [T, k], of each assignment; None: none.

    Returns:
        [rows, h], and the weights in the same order, [rows] (or [0]).
    """
    return torch.ops.megaforge.moe_permute(x, weights, position, rows)


def moe_unpermute(y: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's rows, in fp32 (fp64 for fp64) and rounded once: [rows, h] -> [T, h].

    Args:
        y: [rows, h].
        position: as for :func:`moe_permute`; a token all of whose assignments are dropped gets zeros.
        weights: [T, k], fp32 or the dtype of ``y``; None: ones. Their gradient is made in the pass that makes that of
            ``y``.
    """
    return torch.ops.megaforge.moe_unpermute(y, weights, position)
