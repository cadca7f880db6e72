"""The faster float32 matmul is taken only where it is exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megaforge.training import numerics
from megaforge.training.numerics import choose_matmul_precision, matmul_error


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_highest_is_exact_and_the_check_leaves_the_setting() -> None:
    torch.set_float32_matmul_precision("high")
    assert 1e-9 < matmul_error("highest") < 1e-6
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("error,expected", [(5e-7, "medium"), (3e-3, "highest")])
def test_auto_follows_the_measured_error(monkeypatch: pytest.MonkeyPatch, error: float, expected: str) -> None:
    monkeypatch.setattr(numerics, "matmul_error", lambda precision: error)
    assert choose_matmul_precision("auto") == expected == torch.get_float32_matmul_precision()


def test_auto_keeps_gpu_matmuls_in_fp32() -> None:
    assert choose_matmul_precision("auto", "cuda") == "highest"


def test_bf16_products_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose linear layers round to bf16."""
    exact = torch.nn.functional.linear
    monkeypatch.setattr(numerics.F, "linear", lambda x, w: exact(x.bfloat16(), w.bfloat16()).float())
    assert matmul_error("medium") > 1e-4


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_a_named_precision_is_taken_as_it_is(name: str) -> None:
    assert choose_matmul_precision(name) == name == torch.get_float32_matmul_precision()
