"""When intervals are due."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from megaforge.training.intervals import Interval


def due(interval: Interval, sizes: list[int]) -> list[int]:
    """The steps, of so many tokens each, after which it is due."""
    found, read = [], 0
    for iteration, size in enumerate(sizes, 1):
        trainer: Any = SimpleNamespace(iteration=iteration, tokens_before_step=read, consumed_tokens=read + size)
        read += size
        if interval.is_due(trainer):
            found.append(iteration)
    return found


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(3), [3, 6, 9]),
        (Interval(), []),
        (Interval(tokens=Fraction(20)), [2, 4, 6, 8]),
        (Interval(tokens=Fraction(25)), [3, 5, 8]),  # 30, 50, 80 tokens: the first at or beyond 25, 50, 75
        (Interval(tokens=Fraction(4)), [1, 2, 3, 4, 5, 6, 7, 8, 9]),  # once a step at most
        (Interval(tokens=Fraction(10, 3)), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (Interval(tokens=Fraction(1000)), []),
    ],
)
def test_due(interval: Interval, expected: list[int]) -> None:
    assert due(interval, [10] * 9) == expected
    assert bool(interval) == bool(interval.iterations or interval.tokens)


def test_batches_that_grow_reach_epochs_sooner() -> None:
    assert due(Interval(tokens=Fraction(40)), [10, 10, 20, 20, 40, 40]) == [3, 5, 6]


def test_tenths_of_an_epoch_are_exact() -> None:
    """Ten times a tenth of 7 tokens are 7, at the very step that reads the 7th."""
    assert due(Interval(tokens=7 * Fraction("0.1") * 10), [1] * 14) == [7, 14]
