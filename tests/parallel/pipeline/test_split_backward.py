"""Both halves of a split backward pass together against one plain backward pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megaforge.parallel.pipeline.split_backward import DeferredWeightGradients, backward_input
from tests.parallel.pipeline.toy import Product


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class SharedWeight(nn.Module):
    """One weight in two layers, each with a bias of its own; another layer lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.between = nn.Parameter(randn(4, 4)), nn.Parameter(randn(4, 4))
        self.first_bias, self.second_bias = nn.Parameter(randn(4)), nn.Parameter(randn(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = torch.tanh(nn.functional.linear(x, self.weight, self.first_bias))
        y = torch.tanh(nn.functional.linear(y, self.between))
        return [nn.functional.linear(y, self.weight, self.second_bias)]


class WeightsWithoutInput(nn.Module):
    """An output that no input reaches, a second one built on both, an unused and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Parameter(randn(4, 4)), nn.Parameter(randn(4, 4))
        self.unused, self.frozen = nn.Parameter(randn(3)), nn.Parameter(randn(4), requires_grad=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        made = torch.tanh(self.table @ self.weight) * self.frozen
        return [made, torch.tanh(x @ made) + self.weight.sum()]


class TwoOutputs(nn.Module):
    """The second output is computed from the first, so the first is a root inside the graph of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
        self.norm = nn.LayerNorm(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.a(self.norm(x))
        return [first, x + self.b(torch.relu(first))]


class MatrixProducts(nn.Module):
    """Two products of weights with each other before any input comes near."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(randn(4, 2)), nn.Parameter(randn(2, 4)), nn.Parameter(randn(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [(x @ (self.a @ self.b)) * self.scale + x]


class NoWeights(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x * 2]


@pytest.mark.parametrize("make", [SharedWeight, WeightsWithoutInput, TwoOutputs, MatrixProducts, NoWeights])
@pytest.mark.parametrize("with_input", [True, False])
def test_equals_plain_backward(make: Callable[[], nn.Module], with_input: bool) -> None:
    torch.manual_seed(0)
    module = make()
    start, seeds = randn(4, 4), [randn(4, 4), randn(4, 4)]
    x = start.clone().requires_grad_(with_input)
    outputs = [(y, seed) for y, seed in zip(module(x), seeds, strict=False) if y.requires_grad]
    if not outputs:
        return
    torch.autograd.backward([y for y, _ in outputs], [seed for _, seed in outputs])
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    calls: list[str] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))

    leaf = start.clone().requires_grad_(with_input)
    roots = [get_gradient_edge(y) for y in module(leaf) if y.requires_grad]
    inputs = [leaf] if with_input else []
    gradients, deferred = backward_input(roots, [seed for _, seed in outputs], inputs, module.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())
    deferred.run()

    if with_input:
        torch.testing.assert_close(gradients[0], x.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in module.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    assert sorted(calls) == sorted(name for name, gradient in expected.items() if gradient is not None)


def test_first_half_computes_no_weight_gradient_and_second_no_input_gradient() -> None:
    computed: list[str] = []

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, name: str) -> Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            computed.append(ctx.name)
            return gradient, None

    weights = [nn.Parameter(randn(4, 4)) for _ in range(2)]
    leaf = randn(4, 4).requires_grad_()
    y = leaf
    for index, weight in enumerate(weights):
        y = Traced.apply(y, f"input {index}") @ Traced.apply(weight, f"weight {index}")
    _, deferred = backward_input([get_gradient_edge(y)], [randn(4, 4)], [leaf], weights)
    assert computed == ["input 1", "input 0"]
    computed.clear()
    deferred.run()
    assert sorted(computed) == ["weight 0", "weight 1"]


def test_second_half_needs_nobody_else_to_keep_the_graph_of_python_nodes() -> None:
    weights = [nn.Parameter(randn(4, 4)) for _ in range(2)]

    def first_half() -> DeferredWeightGradients:
        leaf = randn(4, 4).requires_grad_()
        y = Product.apply(Product.apply(leaf, weights[0]), weights[1])
        return backward_input([get_gradient_edge(y)], [torch.ones(4, 4).double()], [leaf], weights)[1]

    deferred = first_half()
    gc.collect()
    deferred.run()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)


def test_saved_activations_are_freed_after_the_second_half() -> None:
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.saved = x * 2
            saved.append(weakref.ref(ctx.saved))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved

    saved: list[weakref.ref[Tensor]] = []
    weight, leaf = nn.Parameter(randn(4, 4)), randn(4, 4).requires_grad_()
    _, deferred = backward_input([get_gradient_edge(Watched.apply(leaf @ weight))], [randn(4, 4)], [leaf], [weight])
    deferred.run()
    gc.collect()
    assert saved[0]() is None
