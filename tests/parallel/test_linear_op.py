"""The linear family with an op that is not the plain one, against the whole matrix in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megaforge.config.model_config import ModelConfig
from megaforge.kernels.grouped_mm import make_runs
from megaforge.parallel import mappings
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.cross_entropy import vocab_parallel_linear_cross_entropy
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import ColumnParallelLinear, GroupedLinear, ReplicatedLinear, RowParallelLinear
from megaforge.parallel.linear_op import PLAIN, PlainLinear
from megaforge.parallel.param_spec import name_parameters, spec_of
from megaforge.parallel.pipeline.split_backward import backward_input
from tests.parallel.pool import RankPool
from tests.toys.int8_linear import Int8Linear, int8

TOKENS, BATCH, WIDTH, INNER, EXPERTS = 4, 3, 8, 12, 3
CTX = ParallelContext.single()
CFG = ModelConfig(hidden_size=WIDTH, num_experts=EXPERTS)
DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rounded(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """To the nearest of 255 multiples of a step, with a gradient as if nothing had happened."""
    step = x.detach().abs().amax(dims, keepdim=True).clamp_min(1e-9) / 127
    return x + ((x / step).round() * step - x).detach()


class Family(nn.Module):
    """One layer of each kind, one after the other, as a model would use them."""

    def __init__(self, ctx: ParallelContext, sequence_parallel: bool, overlap: bool) -> None:
        super().__init__()
        layer = make_layer_context(CFG, ctx, sequence_parallel=sequence_parallel, dtype=DOUBLE, overlap_tp_comm=overlap)
        self.region, init = layer.region, Normal(0.5)
        self.opening = ColumnParallelLinear(layer, WIDTH, INNER, init=init, enter=True, bias=True)
        self.closing = RowParallelLinear(layer, INNER, WIDTH, init=init, bias=True)
        low_rank = layer.parameter((WIDTH, INNER), init, tp_partial_grad=True)
        self.low_rank = ReplicatedLinear(low_rank, transposed=True)
        self.inside = ColumnParallelLinear(layer, INNER, INNER, init=init)
        self.partial = RowParallelLinear(layer, INNER, WIDTH, init=init, reduce=False)
        self.up = GroupedLinear(layer, WIDTH, INNER, init=init, split=1)
        self.down = GroupedLinear(layer, INNER, WIDTH, init=init, split=2)
        name_parameters(self)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        x = x + self.closing(torch.tanh(self.opening(x)))
        inside = self.region.enter(x)
        partial = self.partial(torch.tanh(self.inside(self.low_rank(inside))))
        runs = make_runs(counts, x.device)
        rows = torch.tanh(self.up(inside.reshape(-1, WIDTH), runs))
        return x + self.region.exit(partial + self.down(rows, runs).view_as(inside))


def oracle(w: dict[str, Tensor], x: Tensor, counts: tuple[int, ...]) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return rounded(x, (-1,)) @ rounded(w[f"{name}.weight"], (-2, -1)).mT

    x = x + linear(torch.tanh(linear(x, "opening") + w["opening.bias"]), "closing") + w["closing.bias"]
    low = rounded(x, (-1,)) @ rounded(w["low_rank.weight"], (-2, -1))
    partial = linear(torch.tanh(linear(low, "inside")), "partial")
    out = []
    for rows, up, down in zip(x.reshape(-1, WIDTH).split(counts), w["up.weight"], w["down.weight"], strict=True):
        inner = torch.tanh(rounded(rows, (-1,)) @ rounded(up, (-2, -1)).mT)
        out.append(rounded(inner, (-1,)) @ rounded(down, (-2, -1)).mT)
    return x + partial + torch.cat(out).view_as(x)


def run_family(tp: int, sequence_parallel: bool, overlap: bool, x: Tensor, counts: tuple[int, ...]) -> list[Any]:
    """Twice, with another matrix the second time; what travelled, the last output and the gradients of its square."""
    ctx = ParallelContext.create(tp=tp) if tp > 1 else CTX
    model = Family(ctx, sequence_parallel, overlap)
    initialize_parameters(model, ctx, seed=3)
    int8(model, ctx)
    own = slice(ctx.tp.rank * len(x) // tp, (ctx.tp.rank + 1) * len(x) // tp) if sequence_parallel else slice(None)
    x = x[own].clone().requires_grad_()
    travelled: list[torch.dtype] = []
    gather = mappings.all_gather_single
    mappings.all_gather_single = lambda out, part, **rest: travelled.append(part.dtype) or gather(out, part, **rest)
    try:
        model(x, counts)
    finally:
        mappings.all_gather_single = gather
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    after_update(model, Update(ctx, {}))
    out = model(x, counts)
    out.square().sum().backward()
    gradients = {spec_of(p).name: (spec_of(p).pieces(ctx), p.grad) for p in model.parameters()}
    return [travelled, own, out.detach(), x.grad, gradients, {spec_of(p).name: p.detach() for p in model.parameters()}]


CASES = {
    "some": (random(TOKENS, BATCH, WIDTH, seed=1), (5, 0, 7)),
    "one token": (random(2, 1, WIDTH, seed=2), (0, 2, 0)),
    "alike, with zeros": (
        torch.cat([torch.zeros(2, BATCH, WIDTH), torch.ones(2, BATCH, WIDTH)]).to(DOUBLE),
        (12, 0, 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "tp,sequence_parallel,overlap", [(1, False, True), (2, False, True), (2, True, True), (2, True, False)]
)
def test_another_op(ranks: RankPool, tp: int, sequence_parallel: bool, overlap: bool, case: str) -> None:
    x, counts = CASES[case]
    [whole] = ranks.run(1, run_family, 1, False, True, x, counts)
    w = {name: value.requires_grad_() for name, value in whole[5].items()}
    expected_x = x.clone().requires_grad_()
    expected = oracle(w, expected_x, counts)
    expected.square().sum().backward()
    results = ranks.run(tp, run_family, tp, sequence_parallel, overlap, x, counts)
    for travelled, own, out, grad, gradients, _ in results:
        assert sequence_parallel == (torch.int8 in travelled)
        torch.testing.assert_close(out, expected[own].detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_x.grad[own], rtol=1e-11, atol=1e-11)
        for name, (pieces, value) in gradients.items():
            if name == "low_rank.weight" and tp > 1 or name == "closing.bias" and sequence_parallel:
                value = sum(result[4][name][1] for result in results)
            for piece in pieces:
                full = w[name].grad[tuple(slice(a, b) for a, b in piece.global_box)]
                torch.testing.assert_close(piece.local_view(value), full, rtol=1e-11, atol=1e-11)


class Recorded(PlainLinear):
    """The plain op, which says what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, *args: Any) -> Tensor:
        self.calls.append("forward")
        return super().forward(*args)

    def input_gradient(self, *args: Any) -> Tensor:
        self.calls.append("input")
        return super().input_gradient(*args)

    def weight_gradient(self, *args: Any) -> Tensor:
        self.calls.append("weight")
        return super().weight_gradient(*args)


def halves(tp: int, leaf: bool) -> tuple[list[str], list[str], list[Tensor], list[Tensor]]:
    """The parts of the op that each half of a split backward pass calls, and both ways' gradients."""
    ctx = ParallelContext.create(tp=tp) if tp > 1 else CTX
    context = make_layer_context(CFG, ctx, dtype=DOUBLE)
    layer = ColumnParallelLinear(context, WIDTH, INNER, init=Normal(1.0), enter=True, bias=True)
    name_parameters(layer)
    initialize_parameters(layer, ctx, seed=1)
    layer.op = recorded = Recorded()
    parameters = list(layer.parameters())
    x = random(TOKENS, 1, WIDTH).requires_grad_()
    before = x if leaf else torch.tanh(x)
    direction = random(TOKENS, 1, INNER // tp)
    expected = list(torch.autograd.grad(layer(before), [x, *parameters], direction, retain_graph=not leaf))
    recorded.calls.clear()
    out = layer(before)
    [grad], deferred = backward_input([get_gradient_edge(out)], [direction], [x], parameters)
    first = list(recorded.calls)
    deferred.run()
    assert grad is not None
    got = [grad, *(p.grad for p in parameters if p.grad is not None)]
    return first, recorded.calls[len(first) :], got, expected


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("leaf", [True, False])
def test_each_half_of_a_split_backward_pass_asks_for_its_own_gradient(ranks: RankPool, tp: int, leaf: bool) -> None:
    for first, second, got, expected in ranks.run(tp, halves, tp, leaf):
        assert first == ["forward", "input"] and second == ["weight"]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_head_asks_the_op(dtype: torch.dtype) -> None:
    """With the plain op in parts the loss and gradients are the plain ones; with codes those of the rounded tensors."""
    labels = torch.tensor([0, 1, 2, 3, 3])

    def run(op: Any, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses, *_ = vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, ctx=CTX, vocab_size=4, chunk_tokens=2, op=op
        )
        return [losses, *torch.autograd.grad(losses.sum(), (hidden, weight))]

    hidden, weight = random(5, WIDTH).to(dtype), random(4, WIDTH, seed=4).to(dtype)
    recorded = Recorded()
    for ours, theirs in zip(run(recorded, hidden, weight), run(PLAIN, hidden, weight), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    products = ["forward", "input"] if dtype == torch.float32 else ["forward", "input", "weight"]
    assert recorded.calls == ["forward"] * 3 + products * 3  # chunks of 2, 2 and 1 tokens
    wide = hidden.double(), weight.double()
    for ours, theirs in zip(
        run(Int8Linear(None), *wide), run(PLAIN, rounded(wide[0], (-1,)), rounded(wide[1], (0, 1))), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layers_tell_their_sizes() -> None:
    ctx = ParallelContext.of_rank(0, 4, tp=4, device="meta")
    context = make_layer_context(replace(CFG, num_experts=8), ctx, dtype=DOUBLE)
    layer = ColumnParallelLinear(context, WIDTH, INNER, init=Normal(1.0), bias=True)
    assert (layer.in_features, layer.out_features) == (WIDTH, INNER)
    assert repr(layer) == "ColumnParallelLinear(in_features=8, out_features=12, bias=True, local=3 x 8, op=PlainLinear)"
    stored = ReplicatedLinear(context.parameter((WIDTH, INNER), Normal(1.0)), transposed=True)
    assert (stored.in_features, stored.out_features) == (WIDTH, INNER)
    assert "local=8 of 3 x 8" in repr(GroupedLinear(context, WIDTH, INNER, init=Normal(1.0), split=1))
