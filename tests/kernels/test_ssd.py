"""Mamba-2's recurrence: the chunked form against the definition, outputs, final states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.ssd import CHUNK, ssd, ssd_recurrent
from tests.nn.support import random

BATCH, HEADS, GROUPS, WIDTH, SIZE = 2, 4, 2, 3, 5


def arguments(length: int, strength: float = 1.0, seed: int = 0) -> list[Tensor]:
    """x, steps, a, b, c, skip, initial state."""
    shapes = [(length, BATCH, HEADS, WIDTH), (length, BATCH, HEADS), (HEADS,)]
    shapes += [(length, BATCH, GROUPS, SIZE)] * 2 + [(HEADS,), (BATCH, HEADS, WIDTH, SIZE)]
    x, step, a, b, c, skip, state = (random(*shape, seed=seed + number) for number, shape in enumerate(shapes))
    return [x, step.abs(), -a.abs() * strength, b, c, skip, state]


def compare(given: list[Tensor], starts: Tensor | None, tolerance: float = 1e-12) -> None:
    results = []
    for function in (ssd, ssd_recurrent):
        inputs = [each.clone().requires_grad_() for each in given]
        y, final = function(*inputs, starts)
        loss = (y * random(*y.shape, seed=50)).sum() + (final * random(*final.shape, seed=51)).sum()
        results.append([y, final, *torch.autograd.grad(loss, inputs)])
    names = ("y", "final", "dx", "dstep", "da", "db", "dc", "dskip", "dstate")
    for name, ours, theirs in zip(names, *results, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all(), name
        assert float((ours - theirs).detach().norm()) <= tolerance * max(1.0, float(theirs.detach().norm())), name


def starts_at(length: int, *places: tuple[int, int]) -> Tensor:
    starts = torch.zeros(length, BATCH, dtype=torch.bool)
    for token, row in places:
        starts[token, row] = True
    return starts


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_every_length(length: int) -> None:
    compare(arguments(length), None)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0)],
        [(5, 0), (6, 0), (7, 1)],
        [(CHUNK, 0), (CHUNK - 1, 1), (2 * CHUNK, 1)],
        [(3, 0), (CHUNK + 3, 0), (2 * CHUNK + 1, 0)],
        [(token, row) for token in range(0, 150, 2) for row in range(BATCH)],
    ],
)
def test_documents_begin_with_no_state(places: list[tuple[int, int]]) -> None:
    compare(arguments(2 * CHUNK + 22), starts_at(2 * CHUNK + 22, *places))


@pytest.mark.parametrize("strength", [0.0, 1e-6, 30.0, 1e4])
def test_no_decay_and_complete_decay(strength: float) -> None:
    """Decays are never divided by, so the largest are as right as the least."""
    compare(arguments(CHUNK + 9, strength), starts_at(CHUNK + 9, (4, 1)))


def test_zeros_and_alike_tokens() -> None:
    given = arguments(CHUNK + 2)
    compare([each[:1].expand_as(each).contiguous() if each.shape[0] > BATCH else each for each in given], None)
    zero = [torch.zeros_like(each) for each in given]
    assert not ssd(*zero)[0].any()


def test_a_nan_stays_in_its_head_of_its_sequence_and_behind_its_chunk() -> None:
    given = arguments(2 * CHUNK)
    given[0][CHUNK + 3, 1, 2] = torch.nan
    y = ssd(*given)[0]
    assert y[:CHUNK].isfinite().all() and y[CHUNK + 3 :, 1, 2].isnan().all()
    assert y[:, 0].isfinite().all() and y[:, :, [0, 1, 3]].isfinite().all()


def test_half_precision_keeps_its_type_and_a_wide_state() -> None:
    given = arguments(CHUNK + 7)
    y, final = ssd(*(each.bfloat16() for each in given))
    expected, expected_final = ssd_recurrent(*(each.bfloat16() for each in given))
    assert y.dtype is torch.bfloat16 and final.dtype is torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-4)
