"""Routing to experts: from logits to choices, weights, statistics and the order of rows, and the rows there and back.

Each operator (``torch.ops.megaforge.moe_*``) has its definition in :mod:`megaforge.kernels.moe_routing_reference`,
which runs wherever there is no compiled code (``csrc/moe_routing``). An assignment is a pair of a token and one of its
experts; "rows" are assignments sorted by expert, equal experts in the order of tokens, and ``position`` tells where
each assignment is among them. No implementation depends on the number of threads, not in one bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaforge.kernels import moe_routing_reference as reference
from megaforge.kernels.moe_routing_reference import RoutingRule
from megaforge.kernels.native import say_fallback, why_missing

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
    device = logits.device.type
    if device not in _COMPILED and device != "meta":
        say_fallback("moe_routing", device, "plain torch, several times slower")
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


_LIBRARY = torch.library.Library("megaforge", "FRAGMENT")
_RULE = "int topk, bool sigmoid, bool pre_softmax, int num_groups, int group_topk, float scaling_factor"
_LIBRARY.define(
    f"moe_route(Tensor logits, Tensor? expert_bias, SymInt sequences, {_RULE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "moe_route_backward(Tensor logits, Tensor experts, Tensor lse, Tensor? dweights, Tensor? dlse,"
    f" Tensor? dprobability_sum, Tensor? dz_sum, {_RULE}) -> Tensor"
)
_LIBRARY.define("moe_permutation(Tensor experts, SymInt num_experts, Tensor? kept) -> (Tensor, Tensor)")
_LIBRARY.define("moe_permute(Tensor x, Tensor? weights, Tensor position, SymInt rows) -> (Tensor, Tensor)")
_LIBRARY.define("moe_unpermute(Tensor y, Tensor? weights, Tensor position) -> Tensor")
_LIBRARY.define(
    "moe_unpermute_backward(Tensor grad, Tensor? y, Tensor? weights, Tensor position, SymInt rows) -> (Tensor, Tensor)"
)


def _rule(
    topk: int, sigmoid: bool, pre_softmax: bool, num_groups: int, group_topk: int, scaling_factor: float
) -> RoutingRule:
    score = "sigmoid" if sigmoid else "softmax"
    return RoutingRule(topk, score, pre_softmax, num_groups or None, group_topk or None, scaling_factor)


def _route(logits: Tensor, expert_bias: Tensor | None, sequences: int, *settings: Any) -> tuple[Tensor, ...]:
    rule = _rule(*settings)
    scores = logits.sigmoid() if rule.score_function == "sigmoid" else logits
    experts = reference.choose_experts(scores if expert_bias is None else scores + expert_bias, rule)
    weights, probability = reference.route_scores(logits, rule, experts)
    lse, probability_sum, z_sum = reference.route_statistics(logits, probability, sequences)
    counts = reference.count_experts(experts, logits.shape[1], sequences)
    position, _ = reference.permutation(experts, logits.shape[1], None)
    return weights, experts.int(), lse, position, counts, probability_sum, z_sum


def _route_fake(logits: Tensor, expert_bias: Tensor | None, sequences: int, topk: int, *_: Any) -> tuple[Tensor, ...]:
    tokens, number = logits.shape
    chosen = logits.new_empty(tokens, topk, dtype=torch.int32)
    sums = logits.new_empty(sequences, number, dtype=torch.float64)
    return (
        logits.new_empty(tokens, topk),
        chosen,
        logits.new_empty(tokens),
        torch.empty_like(chosen),
        logits.new_empty(sequences, number, dtype=torch.int64),
        sums,
        logits.new_empty((), dtype=torch.float64),
    )


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, experts, lse, position, counts, *_ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(experts, position, counts)
    ctx.save_for_backward(inputs[0], experts, lse)
    ctx.settings = inputs[3:]


def _route_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts, lse = ctx.saved_tensors
    dweights, _, dlse, _, _, dprobability_sum, dz_sum = grads
    dlogits = torch.ops.megaforge.moe_route_backward(
        logits, experts, lse, dweights, dlse, dprobability_sum, dz_sum, *ctx.settings
    )
    return dlogits, *(None,) * 8


def _route_backward(
    logits: Tensor,
    experts: Tensor,
    lse: Tensor,
    dweights: Tensor | None,
    dlse: Tensor | None,
    dprobability_sum: Tensor | None,
    dz_sum: Tensor | None,
    *settings: Any,
) -> Tensor:
    return reference.route_backward(
        logits, experts, lse, dweights, dlse, dprobability_sum, dz_sum, _rule(*settings)
    ).contiguous()


def _permutation_fake(experts: Tensor, num_experts: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    counts = experts.new_empty(num_experts, dtype=torch.int64)
    return experts.new_empty(experts.shape, dtype=torch.int32), counts


def _permute(x: Tensor, weights: Tensor | None, position: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if weights is None:
        return reference.permute(x, position, rows), x.new_empty(0)
    return reference.permute(x, position, rows), reference.permute_values(weights, position, rows)


def _permute_fake(x: Tensor, weights: Tensor | None, position: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    row_weights = x.new_empty(0) if weights is None else weights.new_empty(rows)
    return x.new_empty(rows, x.shape[1]), row_weights


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.weighted = inputs[1] is not None
    ctx.save_for_backward(inputs[2])


def _permute_gradient(ctx: Any, drows: Tensor | None, drow_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    (position,) = ctx.saved_tensors
    dx = dweights = None
    if drows is not None and ctx.needs_input_grad[0]:
        dx = torch.ops.megaforge.moe_unpermute(drows, None, position)
    if drow_weights is not None and ctx.weighted:
        each = torch.ops.megaforge.moe_unpermute(drow_weights.unsqueeze(1), None, position.view(-1, 1))
        dweights = each.view(position.shape)
    return dx, dweights, None, None


def _unpermute(y: Tensor, weights: Tensor | None, position: Tensor) -> Tensor:
    return reference.unpermute(y, position, weights)


def _unpermute_fake(y: Tensor, weights: Tensor | None, position: Tensor) -> Tensor:
    return y.new_empty(position.shape[0], y.shape[1])


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, position = inputs
    ctx.rows = y.shape[0]
    ctx.save_for_backward(None if weights is None else y, weights, position)


def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weights, position = ctx.saved_tensors
    dy, dweights = torch.ops.megaforge.moe_unpermute_backward(grad, y, weights, position, ctx.rows)
    return dy, None if weights is None else dweights, None


def _unpermute_backward(
    grad: Tensor, y: Tensor | None, weights: Tensor | None, position: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    dy, dweights = reference.unpermute_backward(grad, y, position, weights, rows)
    return dy, grad.new_empty(0) if dweights is None else dweights


def _unpermute_backward_fake(
    grad: Tensor, y: Tensor | None, weights: Tensor | None, position: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    dweights = grad.new_empty(0) if weights is None else torch.empty_like(weights)
    return grad.new_empty(rows, grad.shape[1]), dweights


def _register() -> None:
    plain: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "moe_route": (_route, _route_fake),
        "moe_route_backward": (_route_backward, lambda logits, *_: torch.empty_like(logits)),
        "moe_permutation": (reference.permutation, _permutation_fake),
        "moe_permute": (_permute, _permute_fake),
        "moe_unpermute": (_unpermute, _unpermute_fake),
        "moe_unpermute_backward": (_unpermute_backward, _unpermute_backward_fake),
    }
    for name, (kernel, fake) in plain.items():
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"megaforge::{name}", fake, lib=_LIBRARY)
    for name, gradient, context in (
        ("moe_route", _route_gradient, _route_context),
        ("moe_permute", _permute_gradient, _permute_context),
        ("moe_unpermute", _unpermute_gradient, _unpermute_context),
    ):
        torch.library.register_autograd(f"megaforge::{name}", gradient, setup_context=context, lib=_LIBRARY)


_register()
# Loaded here and not at the first call, which torch.compile may be tracing.
_COMPILED = {device for device in ("cpu", "cuda") if why_missing("moe_routing", device) is None}
