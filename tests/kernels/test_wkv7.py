"""WKV-7: every implementation against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels.wkv7 import wkv7, wkv7_chunked, wkv7_recurrent
from megaforge.kernels.wkv7.native import COMPILED
from tests.kernels.wkv7_cases import (
    HardCase,
    assert_as_good_as_the_definition,
    assert_close,
    hard,
    make_inputs,
    run,
)

# The door (compiled code where there is some) and the portable path.
both = pytest.mark.parametrize("function", [wkv7, wkv7_chunked], ids=["door", "chunked"])


@both
@pytest.mark.parametrize("minimum_decay", [False, True])
@pytest.mark.parametrize("s", [1, 15, 16, 17, 32, 33, 100])
def test_fp32_matches_the_recurrence_with_all_gradients(function, s: int, minimum_decay: bool) -> None:
    inputs = [x.float().double() for x in make_inputs(s, minimum_decay=minimum_decay, seed=s)]
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run(function, inputs, None, torch.float32), expected, 5e-6)
    assert_close(run(function, inputs, None, torch.float64), expected, 1e-13)


@both
@hard
def test_hard_inputs_are_no_worse_than_in_the_recurrence(function, case: HardCase) -> None:
    assert_as_good_as_the_definition(function, case, 16, torch.float32, 5e-6)


@both
def test_decays_far_below_the_minimum_do_not_overflow(function) -> None:
    inputs = [x.float().double() for x in make_inputs(100)]
    inputs[1] = torch.full_like(inputs[1], -2.0)
    assert_close(run(function, inputs, None, torch.float32), run(wkv7_recurrent, inputs, None, torch.float64), 5e-6)


@both
@pytest.mark.parametrize("starts", [[0], [5], [31, 32, 33], [16, 17, 64], [1, 2, 3, 40, 99], list(range(70))])
@pytest.mark.parametrize("minimum_decay", [False, True])
def test_resets_anywhere_match_the_recurrence(function, starts: list[int], minimum_decay: bool) -> None:
    inputs = make_inputs(100, minimum_decay=minimum_decay)
    document_start = torch.zeros(100, 2, dtype=torch.bool)
    document_start[starts, 0] = True
    document_start[[37, 71], 1] = True
    expected = run(wkv7_recurrent, inputs, document_start, torch.float64)
    assert_close(run(function, inputs, document_start, torch.float64), expected, 1e-13)
    assert_close(run(function, inputs, document_start, torch.float32), expected, 5e-6)


@both
def test_a_reset_separates_documents_exactly(function) -> None:
    """What is before a boundary, however large, leaves no trace after it."""
    inputs = make_inputs(50)[:6]
    document_start = torch.zeros(50, 2, dtype=torch.bool)
    document_start[21] = True
    y, state = function(*inputs, None, document_start)
    changed = [x.clone() for x in inputs]
    for x in (changed[0], changed[2], changed[3]):
        x[:21] *= 1e6
    y_changed, state_changed = function(*changed, None, document_start)
    assert torch.equal(y[21:], y_changed[21:]) and torch.equal(state, state_changed)
    y_alone, state_alone = function(*(x[21:] for x in inputs))
    torch.testing.assert_close(y[21:], y_alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, state_alone, rtol=1e-12, atol=1e-12)


@both
def test_pieces_joined_by_the_state_equal_the_whole(function) -> None:
    inputs = make_inputs(75)
    y, state = function(*inputs)
    pieces, carried = [], inputs[6]
    for start, stop in ((0, 40), (40, 41), (41, 43), (43, 75)):
        piece, carried = function(*(x[start:stop] for x in inputs[:6]), carried)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(carried, state, rtol=1e-11, atol=1e-11)


@both
@pytest.mark.parametrize("with_resets", [False, True])
def test_gradcheck(function, with_resets: bool) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(34, batch=1, heads=1, n=2)]
    document_start = torch.zeros(34, 1, dtype=torch.bool)
    document_start[[9, 33]] = True
    assert torch.autograd.gradcheck(lambda *x: function(*x, document_start if with_resets else None), inputs)


def test_groups_of_heads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(80)
    expected = run(wkv7_chunked, inputs, None, torch.float64)
    for at_once in (3, 6, 1000):  # one head, two heads, all heads at once
        monkeypatch.setattr("megaforge.kernels.wkv7.chunked.CPU_CHUNKS_AT_ONCE", at_once)
        assert_close(run(wkv7_chunked, inputs, None, torch.float64), expected, 1e-13)


@both
def test_bf16_inputs_keep_an_fp32_state(function) -> None:
    """The error is that of rounding y and the gradients once, not of a bf16 state."""
    inputs = [x.bfloat16().double() for x in make_inputs(200)[:6]]
    y, state = function(*(x.bfloat16() for x in inputs))
    expected, expected_state = wkv7_recurrent(*inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected.bfloat16().double(), rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-5)


@both
def test_memory_of_inputs_is_not_kept_twice(function) -> None:
    """What is saved for backward beyond the inputs: a state a chunk, or one in 64 tokens and S a."""
    saved = []
    inputs = [x.float().requires_grad_() for x in make_inputs(64)[:6]]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        function(*inputs)
    own = {x.data_ptr() for x in inputs}
    extra = sum(x.numel() for x in saved if x.data_ptr() not in own)
    batch, heads, n = inputs[0].shape[1:]
    native = function is wkv7 and "cpu" in COMPILED
    assert extra == batch * heads * (n * n + 64 * n if native else 2 * n * n)
