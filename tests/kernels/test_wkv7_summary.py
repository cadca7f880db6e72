"""What a span of tokens does to a state, and what it sends back: against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels.wkv7 import wkv7_recurrent, wkv7_state_gradient, wkv7_summary
from tests.kernels.wkv7_cases import HardCase, hard, make_inputs, relative_error

LENGTHS = (1, 2, 31, 32, 33, 100)
# Over 32 tokens of minimum decay P falls below 1e-7, and is no longer exact to all digits.
FORGOTTEN = 1e-7
STARTS = {"none": [], "first token": [0], "last token": [-1], "several": [3, 32, 70]}


def resets(length: int, where: list[int]) -> torch.Tensor | None:
    """Document starts of the first of two sequences; the second has none."""
    start = torch.zeros(length, 2, dtype=torch.bool)
    for place in where:
        if place < length:
            start[place, 0] = True
    return start if where else None


@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_summary_is_what_the_recurrence_does(
    length: int, where: str, dtype: torch.dtype, tolerance: float, minimum_decay: bool
) -> None:
    *inputs, state = make_inputs(length, minimum_decay=minimum_decay, seed=length)
    inputs = [x.float().double() for x in inputs]
    start = resets(length, STARTS[where])
    through, added = wkv7_summary(*(x.to(dtype) for x in inputs), start)
    assert through.dtype == added.dtype == dtype
    nothing = torch.zeros_like(inputs[3])
    # Without values the recurrence only multiplies: from the identity it ends at P.
    identity = torch.eye(16, dtype=torch.float64).expand_as(state)
    expected = wkv7_recurrent(*inputs[:3], nothing, *inputs[4:], identity, start)[1]
    assert relative_error(through, expected, FORGOTTEN) <= tolerance
    assert relative_error(added, wkv7_recurrent(*inputs, None, start)[1]) <= tolerance
    if start is not None and bool(start.any()):
        assert not through[0].any(), "nothing passes the start of a document"
        assert through[1].any()
    whole = wkv7_recurrent(*inputs, state, start)[1]
    assert relative_error(state @ through.double() + added, whole) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_state_gradient_is_that_of_the_recurrence(
    length: int, where: str, dtype: torch.dtype, tolerance: float
) -> None:
    *inputs, state = make_inputs(length, seed=length)
    inputs = [x.float().double() for x in inputs]
    start = resets(length, STARTS[where])
    dy = torch.randn(inputs[3].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dy = dy.float().double()
    state.requires_grad_()
    y, _ = wkv7_recurrent(*inputs, state, start)
    (expected,) = torch.autograd.grad(y, state, dy)
    got = wkv7_state_gradient(*(x.to(dtype) for x in inputs), dy.to(dtype), start)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= tolerance


def by_definition(inputs: list[torch.Tensor], dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """P, Q, the state that they make of the given one, and the initial state's gradient from ``dy``."""
    *six, state = inputs
    identity = torch.eye(state.shape[-1], dtype=state.dtype).expand_as(state)
    through = wkv7_recurrent(*six[:3], torch.zeros_like(six[3]), *six[4:], identity)[1]
    state = state.clone().requires_grad_()
    y, whole = wkv7_recurrent(*six, state)
    (gradient,) = torch.autograd.grad(y, state, dy)
    return through, wkv7_recurrent(*six)[1], whole.detach(), gradient


@hard
def test_hard_inputs_are_no_worse_than_in_the_recurrence(case: HardCase) -> None:
    exact = case.inputs(16)
    inputs = [x.float() for x in exact]
    dy = torch.randn(exact[3].shape, generator=torch.Generator().manual_seed(1))
    through, added = wkv7_summary(*inputs[:6])
    joined = inputs[6] @ through + added
    ours = through, added, joined, wkv7_state_gradient(*inputs[:6], dy)
    expected, own = by_definition(exact, dy.double()), by_definition(inputs, dy)
    for name, got, value, rough in zip(("P", "Q", "state", "gradient"), ours, expected, own, strict=True):
        floor = FORGOTTEN if name == "P" else 0.0
        error, allowed = relative_error(got, value, floor), max(5e-6, 3 * relative_error(rough, value, floor))
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
