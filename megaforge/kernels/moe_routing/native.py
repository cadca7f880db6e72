"""The operators ``torch.ops.megaforge.moe_*``: schemas, shapes and autograd. Their code is in ``csrc/moe_routing``, and
:mod:`.reference` where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaforge.kernels.moe_routing import reference
from megaforge.kernels.moe_routing.reference import RoutingRule
from megaforge.kernels.native import define, load

_RULE = "int topk, bool sigmoid, bool pre_softmax, int num_groups, int group_topk, float scaling_factor"


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


def _route_backward(*arguments: Any) -> Tensor:
    logits, experts, lse, dweights, dlse, dprobabilities, dz_sum, *settings = arguments
    rule = _rule(*settings)
    return reference.route_backward(logits, experts, lse, dweights, dlse, dprobabilities, dz_sum, rule).contiguous()


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


define(
    f"moe_route(Tensor logits, Tensor? expert_bias, SymInt sequences, {_RULE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_fake, _route, _route_gradient, _route_context,
)  # fmt: skip
define(
    "moe_route_backward(Tensor logits, Tensor experts, Tensor lse, Tensor? dweights, Tensor? dlse,"
    f" Tensor? dprobability_sum, Tensor? dz_sum, {_RULE}) -> Tensor",
    lambda logits, *_: torch.empty_like(logits), _route_backward,
)  # fmt: skip
define(
    "moe_permutation(Tensor experts, SymInt num_experts, Tensor? kept) -> (Tensor, Tensor)",
    _permutation_fake, reference.permutation,
)  # fmt: skip
define(
    "moe_permute(Tensor x, Tensor? weights, Tensor position, SymInt rows) -> (Tensor, Tensor)",
    _permute_fake, _permute, _permute_gradient, _permute_context,
)  # fmt: skip
define(
    "moe_unpermute(Tensor y, Tensor? weights, Tensor position) -> Tensor",
    _unpermute_fake, _unpermute, _unpermute_gradient, _unpermute_context,
)  # fmt: skip
define(
    "moe_unpermute_backward(Tensor grad, Tensor? y, Tensor? weights, Tensor position, SymInt rows) -> (Tensor, Tensor)",
    _unpermute_backward_fake, _unpermute_backward,
)  # fmt: skip

COMPILED = load("moe_routing")
