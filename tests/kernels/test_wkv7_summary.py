"""What a span of tokens does to a state, and what it sends back: against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels.wkv7 import wkv7_recurrent, wkv7_state_gradient, wkv7_summary
from tests.kernels.test_wkv7 import make_inputs

LENGTHS = (1, 2, 31, 32, 33, 100)
STARTS = {"none": [], "first token": [0], "last token": [-1], "several": [3, 32, 70]}


def resets(length: int, where: list[int]) -> torch.Tensor | None:
    """Document starts of the first of two sequences; the second has none."""
    start = torch.zeros(length, 2, dtype=torch.bool)
    for place in where:
        if place < length:
            start[place, 0] = True
    return start if where else None


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-9))


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
    # Over 32 tokens of minimum decay P falls below 1e-7, and is no longer exact to all digits.
    assert relative_error(through, expected) <= 4 * tolerance
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
