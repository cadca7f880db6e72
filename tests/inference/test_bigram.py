"""The bigram baseline against a dictionary and its formula."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megaforge.inference import bigram
from megaforge.inference.bigram import BigramModel


def by_hand(train: list[int], test: list[int], vocab: int, strength: float) -> float:
    pairs, followed = Counter(zip(train, train[1:], strict=False)), Counter(train[:-1])
    ones, total = Counter(train[1:]), len(train) - 1
    nats = 0.0
    for x, y in zip(test, test[1:], strict=False):
        prior = (ones[y] + 1) / (total + vocab)
        nats -= math.log((pairs[x, y] + strength * prior) / (followed[x] + strength))
    return nats


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_equals_the_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 9, 400), rng.integers(0, 11, 60)
    model = BigramModel(train.astype(np.uint16), 11)
    expected = by_hand(train.tolist(), test.tolist(), 11, model.strength)
    assert model.nats(test.astype(np.uint16)) == pytest.approx(expected, rel=1e-12)
    assert model.bits(test) == pytest.approx(expected / math.log(2), rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    model = BigramModel(np.array([0, 1, 2, 1, 0, 3, 1, 1, 2]), 5)
    for x in range(5):
        total = sum(math.exp(-model.nats(np.array([x, y]))) for y in range(5))
        assert total == pytest.approx(1.0)


def test_strength_follows_the_data() -> None:
    rng = np.random.default_rng(1)
    chain = np.cumsum(np.ones(4000, np.int64)) % 50  # each token decides the next
    noise = rng.integers(0, 50, 4000)  # it says nothing
    assert BigramModel(chain, 50).strength < BigramModel(noise, 50).strength
