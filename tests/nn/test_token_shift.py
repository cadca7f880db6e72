"""Token shift and its mixes, written out token by token."""

from __future__ import annotations

import types

import pytest
import torch

from megaforge.nn import token_shift as module
from megaforge.nn.token_shift import mix_tokens, shift_and_mix, token_shift
from megaforge.parallel.packed_sequence import PackedSequence
from tests.nn.support import assert_close, random


def test_documents_start_from_zero_and_others_from_their_predecessor() -> None:
    x = random(6, 2, 3)
    start = torch.tensor([[True, False, False, True, True, False], [False] * 6])
    previous = token_shift(x, PackedSequence(2, 6, x.device, start))
    assert torch.equal(previous[[1, 2, 5], 0], x[[0, 1, 4], 0]) and not previous[[0, 3, 4], 0].any()
    assert torch.equal(previous[1:, 1], x[:-1, 1]) and not previous[0, 1].any()


def test_a_state_stands_before_the_first_token() -> None:
    x, state = random(3, 2, 4), random(2, 4, seed=1)
    previous = token_shift(x, PackedSequence(2, 3, x.device, offset=5), state)
    assert torch.equal(previous, torch.cat([state[None], x[:-1]]))


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_mixes_and_their_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of tokens the backward pass takes at once."""
    monkeypatch.setattr("megaforge.nn.token_shift.CPU_ELEMENTS_AT_ONCE", at_once)
    leaves = [random(7, 2, 5), random(7, 2, 5, seed=1), random(5, seed=2), random(5, seed=3)]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.clone().requires_grad_() for leaf in leaves]
    got = mix_tokens(ours[0], ours[1], ours[2:])
    expected = [theirs[0] + (theirs[1] - theirs[0]) * c for c in theirs[2:]]
    for number, (out, reference) in enumerate(zip(got, expected, strict=True)):
        assert_close(out, reference, 1e-14, f"mix {number}")
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(got)).backward()
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(expected)).backward()
    for name, a, b in zip(("x", "previous", "c0", "c1"), ours, theirs, strict=True):
        assert_close(a.grad, b.grad, 1e-14, name)


def test_bf16_mixes_sum_their_gradients_in_fp32() -> None:
    x, previous = random(3000, 1, 4).bfloat16(), random(3000, 1, 4, seed=1).bfloat16()
    coefficient = torch.rand(4, requires_grad=True)
    (out,) = mix_tokens(x, previous, [coefficient])
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert coefficient.grad is not None and coefficient.grad.dtype == torch.float32
    assert_close(coefficient.grad, (previous.double() - x.double()).sum((0, 1)), 1e-5, "coefficient")


def test_a_sequence_in_parts_is_said_to_leave_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "say_plain", said.append)
    monkeypatch.setattr(module, "fused", lambda x: True)
    monkeypatch.setattr(module, "shifted_mixes", lambda x, *rest: ("fused",))
    monkeypatch.setattr(module, "token_shift", lambda x, *rest: torch.zeros_like(x))
    x = random(4, 1, 3)
    shards = types.SimpleNamespace(chunks=range(1), axis=types.SimpleNamespace(size=1))
    info = types.SimpleNamespace(shards=shards, has_boundaries=False)
    assert shift_and_mix(x, info, None, [torch.ones(3)]) == ("fused",) and not said  # type: ignore[arg-type]
    shards.axis.size = 2
    (mixed,) = shift_and_mix(x, info, None, [torch.ones(3)])  # type: ignore[arg-type]
    assert not mixed.any() and len(said) == 1 and "--cp" in said[0]
