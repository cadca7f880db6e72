"""Numbers of experts' use, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.config.expert_layers import ExpertLayers
from megaforge.training.expert_balance import balance_numbers, entropy_bits, greatest_loads, overflow, shares_used


def counts(*layers: list[int]) -> Tensor:
    return torch.tensor(layers, dtype=torch.float64)


def test_entropy() -> None:
    found = entropy_bits(counts([5, 5, 5, 5], [7, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]))
    assert found.tolist() == [2.0, 0.0, 1.0, 0.0]


def test_greatest_load() -> None:
    found = greatest_loads(counts([5, 5, 5, 5], [0, 8, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0]), [4, 4, 4, 4])
    assert found.tolist() == [1.0, 4.0, 2.0, 0.0], "one expert of four got all of its layer's: four times the mean"
    assert greatest_loads(counts([3, 1, 0, 0]), [2]).tolist() == [1.5], "of two experts, behind which there are zeros"


def test_share_of_the_experts_that_are_used() -> None:
    found = shares_used(counts([5, 5, 5, 5], [0, 8, 0, 0], [7, 7, 0, 0]), [4, 4, 4])
    assert found.tolist() == [1.0, 0.25, 0.5]
    assert shares_used(counts([3, 3, 0, 0], [1, 1, 1, 1]), [2, 4]).tolist() == [1.0, 1.0], "a layer of two experts"


def test_overflow() -> None:
    assert overflow(counts([6, 2], [0, 0]), counts([3, 2], [0, 0])).tolist() == [3 / 8, 0.0]


def test_numbers_of_all_layers_and_of_each() -> None:
    layers = ExpertLayers(("0.mixer", "0.ffn"), (2, 4), drop=True)
    assigned, kept = counts([4, 4, 0, 0], [4, 4, 4, 4]), counts([3, 4, 0, 0], [4, 4, 4, 1])
    all_three = torch.stack([assigned, assigned, kept])
    numbers = {name: float(value) for name, value in balance_numbers(all_three, layers, each=True).items()}
    assert numbers == {
        "expert_entropy_bits": 1.5,
        "expert_max_load": 1.0,
        "experts_used": 1.0,
        "expert_overflow": pytest.approx(4 / 24),
        "expert_entropy_bits/0.mixer": 1.0,
        "expert_max_load/0.mixer": 1.0,
        "experts_used/0.mixer": 1.0,
        "expert_overflow/0.mixer": 1 / 8,
        "expert_entropy_bits/0.ffn": 2.0,
        "expert_max_load/0.ffn": 1.0,
        "experts_used/0.ffn": 1.0,
        "expert_overflow/0.ffn": 3 / 16,
    }
    assert set(balance_numbers(all_three, ExpertLayers(layers.names, layers.experts), each=False)) == {
        "expert_entropy_bits",
        "expert_max_load",
        "experts_used",
    }, "where nothing is left out, nothing is said of it"
    assert balance_numbers(torch.zeros(3, 0, 0), ExpertLayers(), each=True) == {}
