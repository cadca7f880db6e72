"""Token shift, written out token by token."""

from __future__ import annotations

import types

import pytest
import torch

from megaforge.nn.token_shift import shift_and_mix, token_shift
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


def test_chunks_of_a_rank_of_cp_follow_what_other_ranks_hold() -> None:
    asked: list[torch.Tensor] = []
    x, firsts = random(4, 1, 3), random(2, 1, 3, seed=1)
    shards = types.SimpleNamespace(chunks=(0, 3), axis=types.SimpleNamespace(size=2))
    shards.before = lambda ends: asked.append(ends) or firsts
    info = types.SimpleNamespace(shards=shards, has_boundaries=False)
    mixed, _ = shift_and_mix(x, info, None, [torch.ones(3, dtype=x.dtype)] * 2)  # type: ignore[arg-type]
    assert torch.equal(mixed, torch.cat([firsts[:1], x[:1], firsts[1:], x[2:3]]))
    assert torch.equal(asked[0], x[[1, 3]])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("continued", [False, True])
def test_the_operator_mixes_what_the_shift_gives(continued: bool, count: int) -> None:
    x, state = random(6, 2, 3), random(2, 3, seed=1) if continued else None
    start = None if continued else torch.tensor([[True, False, False, True, True, False], [False] * 6])
    info = PackedSequence(2, 6, x.device, start, offset=5 if continued else 0)
    coefficients = [random(3, seed=2), random(3, seed=3)][:count]
    for got, c in zip(shift_and_mix(x, info, state, coefficients), coefficients, strict=True):
        assert_close(got, torch.lerp(x, token_shift(x, info, state), c), 1e-15, "mix")
