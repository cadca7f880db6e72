"""Routing to experts: compiled code and plain torch against the fp64 reference, plain Python and autograd."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaforge.kernels.moe_routing import COMPILED as DEVICES
from megaforge.kernels.moe_routing import Route, RoutingRule, moe_permutation, moe_permute, moe_route, moe_unpermute
from megaforge.kernels.moe_routing import reference as moe_routing_reference
from megaforge.kernels.moe_routing.reference import choose_experts, largest, route_scores, route_statistics

COMPILED = "cpu" in DEVICES
SETS = {"AVX512": "avx512", "AVX2": "avx2"}
ISAS = ["scalar"] + (
    [name for capability, name in SETS.items() if capability in torch.backends.cpu.get_cpu_capability()]
    + (["avx2"] if "AVX512" in torch.backends.cpu.get_cpu_capability() else [])
)
RULES = {
    "softmax": RoutingRule(2),
    "scaled": RoutingRule(3, scaling_factor=2.5),
    "before": RoutingRule(2, pre_softmax=True, scaling_factor=1.5),
    "sigmoid": RoutingRule(4, "sigmoid", scaling_factor=0.5),
    "one sigmoid": RoutingRule(1, "sigmoid"),
    "eight": RoutingRule(8),
    "groups": RoutingRule(4, num_groups=4, group_topk=2),
    "before, groups": RoutingRule(4, pre_softmax=True, num_groups=4, group_topk=2),
    "sigmoid groups": RoutingRule(6, "sigmoid", num_groups=4, group_topk=3),
}


@pytest.fixture(params=ISAS if COMPILED else ["plain torch"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this machine in turn."""
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param if COMPILED else "")
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected_route(logits: Tensor, rule: RoutingRule, bias: Tensor | None, sequences: int) -> dict[str, Tensor]:
    """In fp64, differentiable in the logits."""
    scores = logits.sigmoid() if rule.score_function == "sigmoid" else logits
    experts = choose_experts(scores if bias is None else scores + bias, rule)
    weights, probability = route_scores(logits, rule, experts)
    lse, probability_sum, z_sum = route_statistics(logits, probability, sequences)
    return {"weights": weights, "experts": experts, "lse": lse, "probability_sum": probability_sum, "z_sum": z_sum}


def assert_routes(
    logits: Tensor, rule: RoutingRule, bias: Tensor | None, sequences: int, tolerance: float, device: str = "cpu"
) -> None:
    """Choices are exact, values and every gradient within ``tolerance`` of their size or of one."""
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    results = moe_route(ours.to(device), rule, None if bias is None else bias.to(device), sequences)
    route = Route(*(result.cpu() for result in results))
    expected = expected_route(theirs, rule, None if bias is None else bias.double(), sequences)
    assert route.experts.tolist() == expected["experts"].tolist()
    flat = expected["experts"].flatten().tolist()
    order = sorted(range(len(flat)), key=flat.__getitem__)
    position = route.position.flatten()
    assert position[order].tolist() == list(range(len(flat)))
    counts = torch.zeros(sequences, logits.shape[1], dtype=torch.int64)
    for assignment, expert in enumerate(flat):
        counts[assignment // rule.topk % sequences, expert] += 1
    assert route.counts.equal(counts)
    loss, expected_loss = torch.zeros(()).double(), torch.zeros(()).double()
    for number, name in enumerate(("weights", "lse", "probability_sum", "z_sum")):
        value = getattr(route, name)
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance, msg=lambda m: m)
        direction = random(*value.shape, seed=number, dtype=torch.float64) / (1 if value.dim() else 100)
        loss = loss + (value.double() * direction).sum()
        expected_loss = expected_loss + (expected[name] * direction).sum()
    loss.backward()
    expected_loss.backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("tokens", "experts", "sequences"), [(1, 8, 1), (99, 8, 3), (300, 32, 1), (150, 100, 2)])
def test_route(isa: str, rule: RoutingRule, tokens: int, experts: int, sequences: int) -> None:
    bias = random(experts, seed=5) / 4 if rule.score_function == "sigmoid" else None
    logits = 2 * random(tokens, experts)
    assert_routes(logits, rule, bias, sequences, 1e-6)
    assert_routes(logits.double(), rule, None if bias is None else bias.double(), sequences, 1e-13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_ties(data: st.DataObject) -> None:
    """Logits are small multiples of 1/4, so that many are equal."""
    sequences = data.draw(st.integers(1, 4))
    tokens = sequences * data.draw(st.integers(0, 40))
    groups = data.draw(st.sampled_from([1, 1, 2, 3, 5]))
    experts = groups * data.draw(st.integers(1, 30))
    group_topk = data.draw(st.integers(1, groups))
    topk = group_topk * data.draw(st.integers(1, min(experts // groups, 40)))
    sigmoid = data.draw(st.booleans())
    rule = RoutingRule(
        topk,
        "sigmoid" if sigmoid else "softmax",
        pre_softmax=data.draw(st.booleans()),
        num_groups=None if groups == 1 else groups,
        group_topk=None if groups == 1 else group_topk,
    )
    logits = (random(tokens, experts, seed=data.draw(st.integers(0, 9))) * 4).round() / 4
    # Sums of sigmoids or probabilities that differ by rounding would be compared: equal ones only, within groups.
    rounded = sigmoid or rule.pre_softmax
    rule = rule if not rounded or topk == group_topk else RoutingRule(topk, rule.score_function, rule.pre_softmax)
    assert_routes(logits, rule, None, sequences, 2e-6)


def test_ties_go_to_the_lowest_index(isa: str) -> None:
    scores = torch.tensor([[1.0, 2, 2, 1, 2, 0], [0, 0, 0, 0, 0, 0]])
    for k, expected in ((4, [[1, 2, 4, 0], [0, 1, 2, 3]]), (6, [[1, 2, 4, 0, 3, 5], [0, 1, 2, 3, 4, 5]])):
        assert largest(scores, k).tolist() == expected
        assert moe_route(scores, RoutingRule(k)).experts.tolist() == expected
        wide = torch.cat([scores, scores.new_full((2, 200), -9.0)], dim=1)
        assert moe_route(wide, RoutingRule(k)).experts.tolist() == expected
    groups = RoutingRule(2, num_groups=3, group_topk=2)
    assert moe_route(torch.zeros(1, 6), groups).experts.tolist() == [[0, 1]]
    assert moe_route(torch.tensor([[0.0, 0, 5, 5, 5, 5]]), groups).experts.tolist() == [[2, 3]]
    assert moe_route(torch.zeros(1, 300), RoutingRule(40)).experts.tolist() == [list(range(40))]


@pytest.mark.parametrize("experts", [8, 64])
def test_broken_logits_still_name_different_experts(isa: str, experts: int) -> None:
    """A NaN is for the loss to show; nothing may be written out of place on its account."""
    logits = random(40, experts)
    logits[1] = math.nan
    logits[2, 3:] = math.nan
    logits[3] = -math.inf
    logits[4, 5] = math.inf
    for topk in (2, 6):
        route = moe_route(logits, RoutingRule(topk))
        assert all(len(set(row)) == topk for row in route.experts.tolist())
        assert 0 <= int(route.experts.min()) and int(route.experts.max()) < experts
        assert sorted(route.position.flatten().tolist()) == list(range(40 * topk))


def test_the_wanted_accuracy_at_large_logits(isa: str) -> None:
    logits = 30 * random(64, 16)
    assert_routes(logits, RoutingRule(2), None, 1, 1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0])
def test_a_run_of_one_token(isa: str, rule: RoutingRule, scale: float) -> None:
    """All rows alike: every token chooses the same experts; all equal, apart by whole numbers, and saturated."""
    logits = scale * torch.arange(24.0).remainder(7).sub(3).repeat(90, 1)
    # Sums of saturated sigmoids in groups are equal but for rounding; what is chosen then is no promise.
    if rule.score_function == "sigmoid" and rule.num_groups and scale:
        return
    assert_routes(logits, rule, None, 2, 2e-6 if scale <= 1 else 2e-5)  # of the logits' size, 180


def dropped(tokens: int, topk: int, experts: int) -> tuple[Tensor, Tensor]:
    """Choices, and which are kept; one token loses all."""
    generator = torch.Generator().manual_seed(3)
    choices = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :topk].contiguous()
    kept = torch.rand(tokens, topk, generator=generator) < 0.7
    kept[0] = False
    return choices, kept


@pytest.mark.parametrize("drop", [False, True])
def test_permutation(drop: bool) -> None:
    experts, kept = dropped(5000, 2, 7)
    experts[experts == 4] = 3  # an idle one
    permutation = moe_permutation(experts.int(), 7, kept if drop else None)
    entries = [(e, i) for i, (e, k) in enumerate(zip(experts.flatten(), kept.flatten(), strict=True)) if k or not drop]
    expected = torch.full((10000,), -1, dtype=torch.int32)
    for row, (_, assignment) in enumerate(sorted(entries)):
        expected[assignment] = row
    assert permutation.position.flatten().equal(expected)
    assert permutation.counts.tolist() == [sum(1 for e, _ in entries if e == expert) for expert in range(7)]


TOLERANCES = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("tokens", "topk", "width"), [(1, 1, 1), (37, 3, 100), (70, 8, 128), (20, 2, 16)])
@pytest.mark.parametrize("drop", [False, True])
def test_rows_and_back(isa: str, dtype: torch.dtype, tokens: int, topk: int, width: int, drop: bool) -> None:
    experts, kept = dropped(tokens, topk, 9)
    position, counts = moe_permutation(experts, 9, kept if drop else None)
    rows = int(counts.sum())
    weights = random(tokens, topk, seed=1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = random(tokens, width, dtype=dtype)
    results = []
    for run in (
        lambda x, w: moe_permute(x, position, rows, w),
        lambda x, w: (
            moe_routing_reference.permute(x, position, rows),
            moe_routing_reference.permute_values(w, position, rows),
        ),
    ):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        copies, row_weights = run(*inputs)
        loss = (copies * random(rows, width, seed=2, dtype=dtype)).sum(dtype=torch.float64)
        (loss + (row_weights * random(rows, seed=3, dtype=weights.dtype)).sum()).backward()
        results.append((copies, row_weights, inputs[0].grad, inputs[1].grad))
    for name, ours, theirs in zip(("rows", "row weights", "dx", "dweights"), *results, strict=True):
        exact = name in ("rows", "row weights", "dweights")
        tolerance = 0 if exact else TOLERANCES[dtype]
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: name + m)
    y = random(rows, width, seed=4, dtype=dtype)
    for w in (weights, None):
        ours = [t.clone().requires_grad_() for t in ((y,) if w is None else (y, w))]
        theirs = [t.double().detach().requires_grad_() for t in ours]
        out = moe_unpermute(ours[0], position, *ours[1:])
        expected = moe_routing_reference.unpermute(theirs[0], position, *(theirs[1:] or [None]))
        direction = random(tokens, width, seed=6, dtype=dtype)
        out.backward(direction)
        expected.backward(direction.double())
        assert out.dtype == dtype
        for got, wanted in ((out, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))):
            assert got is not None and wanted is not None
            limit = TOLERANCES[dtype] * max(1.0, float(wanted.detach().abs().max()) if wanted.numel() else 1.0)
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=limit)


def test_combining_what_was_dispatched_gives_it_back(isa: str) -> None:
    """Weights that add up to one; more rows than stay in the caches."""
    x = random(1100, 1024)
    route = moe_route(random(1100, 16), RoutingRule(4))
    rows, _ = moe_permute(x, route.position, 4400)
    assert rows[route.position.long()].equal(x.unsqueeze(1).expand(-1, 4, -1))
    torch.testing.assert_close(moe_unpermute(rows, route.position, route.weights), x, rtol=2e-6, atol=2e-6)
    assert moe_unpermute(rows[:, :64].contiguous(), route.position).equal(x[:, :64] * 4)


def test_plain_torch_has_the_same_gradients() -> None:
    """The backward passes that run where there is no compiled code."""
    for rule in RULES.values():
        logits = random(12, 24, dtype=torch.float64).requires_grad_()
        outputs = expected_route(logits, rule, None, 3)
        names = ("weights", "lse", "probability_sum", "z_sum")
        grads = [random(*outputs[name].shape, seed=n, dtype=torch.float64) for n, name in enumerate(names)]
        (expected,) = torch.autograd.grad([outputs[name] for name in names], logits, grads)
        got = moe_routing_reference.route_backward(
            logits.detach(), outputs["experts"], outputs["lse"].detach(), *grads, rule
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    position, counts = moe_permutation(*dropped(6, 2, 3)[:1], 3, dropped(6, 2, 3)[1])
    y = random(int(counts.sum()), 5, dtype=torch.float64).requires_grad_()
    weights, grad = random(6, 2, dtype=torch.float64).requires_grad_(), random(6, 5, seed=1, dtype=torch.float64)
    out = moe_routing_reference.unpermute(y, position, weights)
    expected = torch.autograd.grad(out, (y, weights), grad)
    got = moe_routing_reference.unpermute_backward(grad, y.detach(), position, weights.detach(), len(y))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def everything(logits: Tensor, x: Tensor, rule: RoutingRule) -> list[Tensor]:
    """Route, dispatch, combine and their gradients."""
    logits, x = logits.clone().requires_grad_(), x.clone().requires_grad_()
    route = moe_route(logits, rule, None, 2)
    rows, row_weights = moe_permute(x, route.position, route.position.numel(), route.weights)
    out = moe_unpermute(rows * row_weights.unsqueeze(1), route.position, route.weights)
    loss = out.square().sum() + route.probability_sum.square().sum() + route.z_sum
    return [*route, rows, row_weights, out, *torch.autograd.grad(loss, (logits, x))]


@pytest.mark.parametrize("rule", [RULES["softmax"], RULES["sigmoid groups"]], ids=["narrow", "wide"])
def test_the_number_of_threads_changes_no_bit(rule: RoutingRule) -> None:
    logits, x = random(3000, 24), random(3000, 48)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(logits, x, rule))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(ours.equal(theirs) for ours, theirs in zip(results[0], other, strict=True))


def test_gradcheck() -> None:
    logits, x = random(6, 5, dtype=torch.float64), random(6, 3, dtype=torch.float64)

    def run(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        route = moe_route(logits, RoutingRule(2), None, 2)
        rows, row_weights = moe_permute(x, route.position, 12, route.weights)
        out = moe_unpermute(rows * row_weights.unsqueeze(1), route.position, route.weights)
        return out, route.lse, route.probability_sum, route.z_sum

    assert torch.autograd.gradcheck(run, (logits.requires_grad_(), x.requires_grad_()))


def test_operators_are_registered_correctly() -> None:
    ops = torch.ops.megaforge
    logits, x = random(6, 8).requires_grad_(), random(6, 4).requires_grad_()
    rule = (2, False, False, 0, 0, 1.0)
    weights, experts, lse, position, counts, probability, z = (
        t.detach() for t in ops.moe_route(logits, None, 2, *rule)
    )
    rows = random(12, 4)
    for operator, args in (
        (ops.moe_route, (logits, None, 2, *rule)),
        (ops.moe_route, (logits, random(8), 3, 4, True, False, 4, 2, 2.0)),
        (ops.moe_route_backward, (logits.detach(), experts, lse, weights, None, probability, z, *rule)),
        (ops.moe_permutation, (experts, 8, None)),
        (ops.moe_permutation, (experts, 8, weights > 0.6)),
        (ops.moe_permute, (x, None, position, 12)),
        (ops.moe_permute, (x, weights.clone().requires_grad_(), position, 12)),
        (ops.moe_unpermute, (rows.clone().requires_grad_(), None, position)),
        (ops.moe_unpermute, (rows.clone().requires_grad_(), weights.clone().requires_grad_(), position)),
        (ops.moe_unpermute_backward, (x.detach(), rows, weights, position, 12)),
        (ops.moe_unpermute_backward, (x.detach(), None, None, position, 12)),
    ):
        torch.library.opcheck(operator, args)


def test_compiled_and_recomputed_graphs_give_the_same() -> None:
    logits, x = random(32, 8), random(32, 16)

    def run(logits: Tensor, x: Tensor) -> Tensor:
        route = moe_route(logits, RoutingRule(2), None, 2)
        rows, row_weights = moe_permute(x, route.position, 64, route.weights)
        out = moe_unpermute(rows * row_weights.unsqueeze(1), route.position)
        return out.square().sum() + route.z_sum + route.probability_sum.square().sum()

    results = []
    for function in (
        run,
        torch.compile(run, backend="aot_eager", fullgraph=True),
        lambda *inputs: checkpoint(run, *inputs, use_reentrant=False),
    ):
        inputs = logits.clone().requires_grad_(), x.clone().requires_grad_()
        loss = function(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for other in results[1:]:
        assert all(ours.equal(theirs) for ours, theirs in zip(results[0], other, strict=True))


@pytest.mark.skipif(not COMPILED, reason="what compiled code checks")
def test_positions_out_of_place_are_refused() -> None:
    position = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="positions name 2 rows of 3"):
        moe_permute(random(1, 4), position, 3)
    with pytest.raises(RuntimeError, match="positions name"):
        moe_unpermute(random(2, 4), position)
    with pytest.raises(RuntimeError, match="experts from 0 to 3 of 3"):
        moe_permutation(torch.tensor([[0, 3]]), 3)
    with pytest.raises(RuntimeError, match="topk 9 of 8 experts"):
        moe_route(random(2, 8), RoutingRule(9))


def test_without_compiled_code_it_says_so_once() -> None:
    program = (
        "import torch; from megaforge.kernels.moe_routing import RoutingRule, moe_route\n"
        "for _ in range(2): r = moe_route(torch.arange(12.0).view(2, 6), RoutingRule(2))\n"
        "print(r.experts.tolist())"
    )
    environment = {**os.environ, "MEGAFORGE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[5, 4], [5, 4]]"
    assert done.stderr.count("moe_routing: no compiled code for cpu (MEGAFORGE_NATIVE=0)") == 1
