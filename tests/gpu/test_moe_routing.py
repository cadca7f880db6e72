"""Routing on a GPU: what tests/kernels/test_moe_routing.py asserts of a CPU's compiled code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.moe_routing import COMPILED, RoutingRule, moe_permutation, moe_permute, moe_route, moe_unpermute
from megaforge.kernels.moe_routing import reference as moe_routing_reference
from tests.kernels.test_moe_routing import RULES, TOLERANCES, assert_routes, dropped, everything, random

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in COMPILED, reason="needs a GPU and its extension"
)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(
    ("tokens", "experts", "sequences"), [(1, 8, 1), (99, 16, 3), (300, 32, 1), (150, 100, 2), (70, 1024, 1)]
)
def test_route(rule: RoutingRule, tokens: int, experts: int, sequences: int) -> None:
    bias = random(experts, seed=5) / 4 if rule.score_function == "sigmoid" else None
    logits = 2 * random(tokens, experts)
    assert_routes(logits, rule, bias, sequences, 2e-6, "cuda")
    assert_routes(logits.double(), rule, None if bias is None else bias.double(), sequences, 1e-12, "cuda")


def test_ties_and_broken_logits() -> None:
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 0], [0, 0, 0, 0, 0, 0]], device="cuda")
    assert moe_route(scores, RoutingRule(4)).experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert moe_route(scores, RoutingRule(6)).experts.tolist() == [[1, 2, 4, 0, 3, 5], [0, 1, 2, 3, 4, 5]]
    logits = random(40, 64).cuda()
    logits[1] = torch.nan
    logits[2, 3:] = torch.nan
    logits[3] = -torch.inf
    route = moe_route(logits, RoutingRule(6))
    assert all(len(set(row)) == 6 and 0 <= min(row) and max(row) < 64 for row in route.experts.tolist())
    assert sorted(route.position.flatten().tolist()) == list(range(240))


@pytest.mark.parametrize("drop", [False, True])
def test_permutation(drop: bool) -> None:
    experts, kept = dropped(5000, 2, 7)
    expected = moe_routing_reference.permutation(experts, 7, kept if drop else None)
    got = moe_permutation(experts.cuda(), 7, kept.cuda() if drop else None)
    assert got.position.cpu().equal(expected[0]) and got.counts.cpu().equal(expected[1])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("tokens", "topk", "width"), [(1, 1, 1), (37, 3, 100), (70, 8, 1024)])
def test_rows_and_back(dtype: torch.dtype, tokens: int, topk: int, width: int) -> None:
    experts, kept = dropped(tokens, topk, 9)
    position, counts = moe_permutation(experts, 9, kept)
    rows, weights = int(counts.sum()), random(tokens, topk, seed=1)
    weights = weights.double() if dtype == torch.float64 else weights
    x, y = random(tokens, width, dtype=dtype), random(rows, width, seed=4, dtype=dtype)
    copies, row_weights = moe_permute(x.cuda(), position.cuda(), rows, weights.cuda())
    assert copies.cpu().equal(moe_routing_reference.permute(x, position, rows))
    assert row_weights.cpu().equal(moe_routing_reference.permute_values(weights, position, rows))
    grad = random(tokens, width, seed=6, dtype=dtype)
    ours = [t.cuda().requires_grad_() for t in (y, weights)]
    out = moe_unpermute(ours[0], position.cuda(), ours[1])
    out.backward(grad.cuda())
    wide = y.double(), weights.double()
    expected: list[Tensor] = [moe_routing_reference.unpermute(wide[0], position, wide[1])]
    gradients = moe_routing_reference.unpermute_backward(grad.double(), wide[0], position, wide[1], rows)
    for got, wanted in zip((out, ours[0].grad, ours[1].grad), (*expected, *gradients), strict=True):
        assert got is not None and wanted is not None
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
        torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=0, atol=TOLERANCES[dtype] * scale)


def test_every_run_gives_the_same_bits() -> None:
    logits, x = random(3000, 64).cuda(), random(3000, 48).cuda()
    first = everything(logits, x, RoutingRule(8))
    for _ in range(3):
        again = everything(logits, x, RoutingRule(8))
        assert all(ours.equal(theirs) for ours, theirs in zip(first, again, strict=True))
