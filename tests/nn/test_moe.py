"""Mixture of experts against a written-out fp64 form, one token at a time; routing against plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.kernels.moe_routing import moe_route
from megaforge.nn.moe import MoEFFN, expert_counts
from megaforge.nn.moe.routing import routing_rule, within_capacity
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from tests.nn.support import CTX, assert_agrees, random
from tests.nn.test_ffn import (
    BATCH,
    CPU,
    EXPERTS,
    HIDDEN,
    LENGTH,
    build,
    config,
    mixed,
    nonlinearity,
    packed_info,
)

SIX = {"num_experts": 6}
SIGMOID = {"moe_router_score_function": "sigmoid"}
GROUPS = {**SIX, "moe_router_num_groups": 3, "moe_router_group_topk": 2}


def update(module: MoEFFN, assigned: Tensor, preferred: Tensor) -> None:
    after_update(module, Update(CTX, expert_counts(module, assigned, preferred)))


def chosen_in_python(scores: Sequence[float], cfg: ModelConfig, plain: bool = False) -> list[int]:
    """The best k of the experts whose group is among the best, by sorting; equals in order of index. ``plain``: of all
    experts."""
    if plain:
        return sorted(range(len(scores)), key=lambda e: -scores[e])[: cfg.moe_router_topk]
    number = len(scores)
    size = number // (cfg.moe_router_num_groups or 1)
    worth = []
    for group in range(number // size):
        best = sorted(scores[group * size : (group + 1) * size], reverse=True)
        worth.append(sum(best[: cfg.moe_router_topk // (cfg.moe_router_group_topk or 1)]))
    groups = sorted(range(len(worth)), key=lambda g: -worth[g])[: cfg.moe_router_group_topk or 1]
    return sorted((e for e in range(number) if e // size in groups), key=lambda e: -scores[e])[: cfg.moe_router_topk]


def oracle(x: Tensor, w: dict[str, Tensor], cfg: ModelConfig, info: PackedSequence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, load-balance sum and z-loss sum, token by token and expert by expert."""
    number, topk = cfg.num_experts, cfg.moe_router_topk
    x = mixed(x, w, info) if "f.x_k" in w else x
    bias = w.get("f.router.expert_bias", torch.zeros(number, dtype=x.dtype)).detach()
    factor, limit = cfg.moe_router_topk_scaling_factor or 1.0, cfg.moe_expert_capacity_factor
    capacity = math.ceil(limit * topk * x.shape[0] / number) if limit else x.shape[0]
    outs = [[torch.zeros(HIDDEN, dtype=x.dtype) for _ in range(x.shape[1])] for _ in range(x.shape[0])]
    balance, z_loss = torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for b in range(x.shape[1]):
        share, probability, assigned = torch.zeros(number, dtype=x.dtype), torch.zeros(number, dtype=x.dtype), []
        for t in range(x.shape[0]):
            logits = w["f.router.weight"] @ x[t, b]
            softmax = cfg.moe_router_score_function == "softmax"
            scores = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
            before = softmax and cfg.moe_router_pre_softmax
            chosen = chosen_in_python(((logits if softmax and not before else scores) + bias).tolist(), cfg)
            one = before or (topk == 1 and not softmax)
            total = torch.ones((), dtype=x.dtype) if one else sum(scores[e] for e in chosen)
            assigned += [(t, e, scores[e] / total * factor) for e in chosen]
            for e in chosen_in_python(scores.tolist(), cfg, plain=True):
                share[e] += 1 / (topk * x.shape[0])
            probability = probability + scores / scores.sum() / x.shape[0]
            z_loss = z_loss + logits.exp().sum().log() ** 2
        if cfg.moe_token_drop_policy == "probs":
            assigned.sort(key=lambda item: -float(item[2].detach()))
        taken = [0] * number
        for t, e, weight in assigned:
            taken[e] += 1
            if taken[e] <= capacity:
                inner = nonlinearity(cfg.activation, w["f.up.weight"][e] @ x[t, b])
                outs[t][b] = outs[t][b] + weight * (w["f.down.weight"][e] @ inner)
        if cfg.moe_router_load_balancing_type != "none":
            share = w["f.router.previous_load"] if "f.router.previous_load" in w else share
            balance = balance + number * (share.detach() * probability).sum()
    out = torch.stack([torch.stack(row) for row in outs])
    if "f.shared_expert.up.weight" in w:
        inner = nonlinearity(cfg.activation, x @ w["f.shared_expert.up.weight"].t())
        out = out + inner @ w["f.shared_expert.down.weight"].t()
    return out, balance, z_loss


def assert_layer_agrees(module: MoEFFN, cfg: ModelConfig, length: int = LENGTH) -> None:
    info = packed_info() if length == LENGTH else PackedSequence(BATCH, length, CPU)

    def flat(out: Tensor, balance: Tensor, z_loss: Tensor) -> Tensor:
        return torch.cat([out.flatten(), balance.view(1), z_loss.view(1)])

    def run(x: Tensor) -> Tensor:
        out, _, losses = module(x, info)
        return flat(out, losses.load_balance_sum, losses.z_loss_sum)

    assert_agrees(module, run, lambda x, w: flat(*oracle(x, w, cfg, info)), random(length, BATCH, HIDDEN))


@pytest.mark.parametrize("topk", [1, 2, EXPERTS])
@pytest.mark.parametrize("activation,channel_mix", [("relu2", True), ("swiglu", False)])
def test_experts_and_router_losses(activation: str, channel_mix: bool, topk: int) -> None:
    """The two losses enter the compared value, so their gradients are compared too."""
    cfg = config(activation=activation, moe_router_topk=topk)
    assert_layer_agrees(build(MoEFFN, cfg, channel_mix), cfg)


@pytest.mark.parametrize(
    "changes",
    [
        SIGMOID,
        {**SIGMOID, "moe_router_topk": 1, "moe_router_topk_scaling_factor": 2.5},
        {**SIGMOID, "moe_router_enable_expert_bias": True},
        GROUPS,
        {"moe_router_pre_softmax": True, "moe_router_topk": 1},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {**GROUPS, "moe_router_pre_softmax": True, "moe_router_topk": 4},
        {**GROUPS, **SIGMOID, "moe_router_load_balancing_type": "global_aux_loss"},
        {**SIGMOID, **GROUPS, "moe_router_topk": 4, "moe_router_enable_expert_bias": True},
        {"moe_router_load_balancing_type": "global_aux_loss"},
        {"moe_router_load_balancing_type": "none", "moe_router_topk_scaling_factor": 0.5},
        {"moe_shared_expert_intermediate_size": 6, "activation": "swiglu"},
        {"moe_expert_capacity_factor": 0.6},
        {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "probs"},
        {"moe_expert_capacity_factor": 100.0},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_ways_to_route(changes: dict[str, object]) -> None:
    cfg = config(**changes)
    cfg.validate()
    assert_layer_agrees(build(MoEFFN, cfg, False), cfg)


def test_one_token() -> None:
    cfg = config(moe_expert_capacity_factor=0.1)
    assert_layer_agrees(build(MoEFFN, cfg, False), cfg, length=1)


def test_counts_and_idle_experts() -> None:
    """All tokens to expert 3: the others' gradients are zero, not missing, and balance is at its worst."""
    module = build(MoEFFN, config(moe_router_topk=1), False)
    with torch.no_grad():
        module.router.weight.zero_()[3] = 1.0
    out, _, losses = module(random(LENGTH, BATCH, HIDDEN).abs(), PackedSequence(BATCH, LENGTH, CPU))
    assert losses.tokens_per_expert.tolist() == [0, 0, 0, LENGTH * BATCH, 0]
    assert float(losses.load_balance_sum.detach()) > BATCH * 2
    out.sum().backward()
    assert module.up.weight.grad is not None
    assert [bool(g.any()) for g in module.up.weight.grad] == [False, False, False, True, False]


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_what_full_experts_leave_out_is_counted(policy: str) -> None:
    """Of each sequence an expert keeps at most its capacity; in evaluation everything."""
    cfg = config(moe_expert_capacity_factor=0.6, moe_token_drop_policy=policy)
    module, x = build(MoEFFN, cfg, False), random(LENGTH, BATCH, HIDDEN)
    capacity = math.ceil(0.6 * cfg.moe_router_topk * LENGTH / EXPERTS)
    whole, expected = [0] * EXPERTS, [0] * EXPERTS
    for sequence in (x @ module.router.weight.detach().t()).unbind(1):
        chosen = [e for logits in sequence.tolist() for e in chosen_in_python(logits, cfg)]
        whole = [whole[e] + chosen.count(e) for e in range(EXPERTS)]
        expected = [expected[e] + min(chosen.count(e), capacity) for e in range(EXPERTS)]
    _, _, losses = module(x, PackedSequence(BATCH, LENGTH, CPU))
    assert losses.tokens_per_expert.tolist() == whole and losses.kept_per_expert.tolist() == expected != whole
    assert losses.counts(EXPERTS + 1).tolist() == [[*whole, 0], [*whole, 0], [*expected, 0]]
    _, _, losses = module.eval()(x, PackedSequence(BATCH, LENGTH, CPU))
    assert losses.kept_per_expert.tolist() == whole


def test_balance_loss_is_one_a_sequence_when_balanced() -> None:
    module = build(MoEFFN, config(), False)
    with torch.no_grad():
        module.router.weight.zero_()
    _, _, losses = module(random(LENGTH, BATCH, HIDDEN), PackedSequence(BATCH, LENGTH, CPU))
    assert abs(float(losses.load_balance_sum.detach()) - BATCH) < 1e-12
    assert abs(float(losses.z_loss_sum.detach()) - LENGTH * BATCH * math.log(EXPERTS) ** 2) < 1e-9


@pytest.mark.parametrize(("groups", "group_topk", "topk"), [(3, 2, 2), (3, 2, 4), (2, 1, 3), (6, 3, 3)])
def test_group_limited_choice(groups: int, group_topk: int, topk: int) -> None:
    cfg = config(**SIX, moe_router_topk=topk, moe_router_num_groups=groups, moe_router_group_topk=group_topk)
    cfg.validate()
    scores = random(40, 6).round(decimals=1)
    expected = [chosen_in_python(row, cfg) for row in scores.tolist()]
    assert moe_route(scores, routing_rule(cfg)).experts.tolist() == expected


def test_before_the_softmax_groups_are_ranked_by_probability() -> None:
    """One group has the most likely expert and an impossible one, the other two that are middling."""
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    rule = {"num_experts": 4, "moe_router_num_groups": 2, "moe_router_group_topk": 1}
    chosen = [
        moe_route(logits, routing_rule(config(**rule, moe_router_pre_softmax=before))).experts.tolist()
        for before in (False, True)
    ]
    assert chosen == [[[2, 3]], [[0, 1]]]


@pytest.mark.parametrize("before", [False, True])
def test_one_expert_a_token_trains_its_router(before: bool) -> None:
    """Through its weight, if that is a probability: renormalised to one it gives the router no gradient at all."""
    module = build(MoEFFN, config(moe_router_topk=1, moe_router_pre_softmax=before), False)
    out, *_ = module(random(LENGTH, BATCH, HIDDEN), PackedSequence(BATCH, LENGTH, CPU))
    out.square().sum().backward()
    assert module.router.weight.grad is not None
    assert bool(module.router.weight.grad.abs().max() > 1e-6) == before


def test_the_balance_loss_counts_what_the_router_prefers() -> None:
    """A bias sends every token to experts 0 and 1, and moves by that; the loss sees the scores' own choices."""
    changes = {**SIGMOID, "moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "global_aux_loss"}
    module = build(MoEFFN, config(**changes), False)
    with torch.no_grad():
        module.router.expert_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0]))
    x = random(LENGTH, BATCH, HIDDEN)
    _, _, losses = module(x, PackedSequence(BATCH, LENGTH, CPU))
    preferred = (x @ module.router.weight.detach().T).topk(2).indices.flatten().bincount(minlength=EXPERTS)
    assert losses.tokens_per_expert.tolist() == [LENGTH * BATCH] * 2 + [0] * 3
    assert losses.preferred_per_expert.tolist() == preferred.tolist() and int((preferred > 0).sum()) > 2
    update(module, losses.tokens_per_expert[None], losses.preferred_per_expert[None])
    torch.testing.assert_close(module.router.previous_load.detach(), preferred.double() / preferred.sum())
    assert (module.router.expert_bias > torch.tensor([9.0, 9, 0, 0, 0])).tolist() == [False, False, True, True, True]


def test_capacity_by_position_and_by_weight() -> None:
    experts = torch.tensor([[[0], [1]], [[0], [1]], [[0], [0]], [[1], [1]]])  # two sequences of four tokens
    weights = torch.tensor([[[0.1], [0.5]], [[0.9], [0.5]], [[0.5], [0.2]], [[0.1], [0.9]]])
    by_position = within_capacity(experts, weights, 2, 2, "position")
    assert by_position.squeeze(-1).t().tolist() == [[True, True, False, True], [True, True, True, False]]
    by_weight = within_capacity(experts, weights, 2, 2, "probs")
    assert by_weight.squeeze(-1).t().tolist() == [[False, True, True, True], [True, False, True, True]]
    rounding = torch.tensor([1.0, 1 + 1e-7, 1 - 1e-7, 1.0]).view(4, 1, 1).expand(4, 2, 1)
    assert within_capacity(experts, rounding, 2, 1, "probs").equal(within_capacity(experts, rounding, 2, 1, "position"))


def test_nothing_is_dropped_outside_training() -> None:
    full, limited = build(MoEFFN, config(), False), build(MoEFFN, config(moe_expert_capacity_factor=0.3), False)
    x, info = random(LENGTH, BATCH, HIDDEN), PackedSequence(BATCH, LENGTH, CPU)
    assert not torch.equal(full(x, info)[0], limited(x, info)[0])
    torch.testing.assert_close(full.eval()(x, info)[0], limited.eval()(x, info)[0], rtol=0, atol=0)


def test_bias_moves_against_the_load_and_is_not_trained() -> None:
    module = build(
        MoEFFN, config(**SIGMOID, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.25), False
    )
    bias = module.router.expert_bias
    assert bias is not None and not bias.requires_grad
    before = bias.clone()
    update(module, torch.tensor([[4, 0, 2, 2, 2]]), torch.tensor([[0, 4, 2, 2, 2]]))
    torch.testing.assert_close(bias - before, torch.tensor([-0.25, 0.25, 0, 0, 0], dtype=torch.float64))
    assert {spec.name for spec, _ in named_specs(module)} >= {"f.router.expert_bias", "f.router.weight"}


def test_global_balance_loss_reads_the_previous_global_batch() -> None:
    """The same batch in one or in three micro-batches has the same loss and gradient; at first the loss is 1."""
    cfg = config(moe_router_load_balancing_type="global_aux_loss")
    x, results = random(LENGTH, 3, HIDDEN), []
    for pieces in (x.split(3, dim=1), x.split(1, dim=1)):
        module = build(MoEFFN, cfg, False)
        with torch.no_grad():
            module.router.previous_load.fill_(1 / EXPERTS)
        seen = []
        for _ in range(2):
            module.router.weight.grad = None
            outputs = [module(piece, PackedSequence(piece.shape[1], LENGTH, CPU)).losses for piece in pieces]
            balance = sum(losses.load_balance_sum for losses in outputs) / 3
            balance.backward()
            seen += [balance.detach(), module.router.weight.grad]
            counts = [sum(losses.tokens_per_expert for losses in outputs)[None]] * 2
            update(module, *counts)
        results.append(seen)
        assert abs(float(seen[0]) - 1) < 1e-12 and float(seen[1].norm()) < 1e-12
        assert float(seen[3].norm()) > 1e-3
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_counts_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="counts of 2 MoE layers for a model that has 1"):
        expert_counts(build(MoEFFN, config(), False), torch.zeros(2, EXPERTS), torch.zeros(2, EXPERTS))


def test_router_stays_in_fp32() -> None:
    cfg = config(**SIGMOID, moe_router_enable_expert_bias=True)
    module = build(MoEFFN, cfg, True, torch.bfloat16)
    assert module.router.weight.dtype == torch.float32 and module.up.weight.dtype == torch.bfloat16
    assert module.router.expert_bias is not None and module.router.expert_bias.dtype == torch.float32
    x = random(LENGTH, BATCH, HIDDEN).bfloat16()
    routing, losses = module.router.route(x, packed_info())
    assert routing.weights.dtype == torch.float32 == losses.load_balance_sum.dtype
    out, *_ = module(x, packed_info())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert module.router.weight.grad is not None and bool(module.router.weight.grad.any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_enable_expert_bias": True}, "add --moe-router-score-function sigmoid"),
        ({"moe_router_num_groups": 3}, "set both or neither"),
        ({"moe_router_topk": 1}, "--moe-router-topk 1: .* add --moe-router-pre-softmax"),
        (
            {**GROUPS, "moe_router_num_groups": 4},
            "--moe-router-num-groups 4 does not divide --num-experts 6; use 1, 2, 3 or 6",
        ),
        ({**GROUPS, "moe_router_topk": 3}, "--moe-router-group-topk 2: .*with --moe-router-topk 3 and 3 groups; use 3"),
    ],
)
def test_impossible_routing_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes).validate()
