"""Token shift, written out token by token."""

from __future__ import annotations

import types

import pytest
import torch

from megaforge.nn import token_shift as module
from megaforge.nn.token_shift import shift_and_mix, token_shift
from megaforge.parallel.packed_sequence import PackedSequence
from tests.nn.support import random


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


@pytest.mark.parametrize("continued", [False, True])
def test_the_operator_mixes_what_the_shift_gives(continued: bool) -> None:
    x, state = random(6, 2, 3), random(2, 3, seed=1) if continued else None
    start = None if continued else torch.tensor([[True, False, False, True, True, False], [False] * 6])
    info = PackedSequence(2, 6, x.device, start, offset=5 if continued else 0)
    coefficients = [random(3, seed=2), random(3, seed=3)]
    for got, c in zip(shift_and_mix(x, info, state, coefficients), coefficients, strict=True):
        assert torch.equal(got, torch.lerp(x, token_shift(x, info, state), c))
