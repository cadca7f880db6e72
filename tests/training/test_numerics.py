"""The faster float32 matmul is taken only where it is exact."""

from __future__ import annotations

import subprocess
import sys
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


_MIXED = """
import torch
from megaforge.training.numerics import choose_matmul_precision, matmul_error

backends = torch.backends
matmuls = backends.cuda.matmul, backends.mkldnn.matmul
refused = 0
for start in ("medium", "highest"):
    for dirty in (
        "backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = True",  # as the package rwkv does
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "backends.fp32_precision = 'tf32'",
    ):
        torch.set_float32_matmul_precision(start)
        exec(dirty)
        try:
            torch.get_float32_matmul_precision()
        except RuntimeError:
            refused += 1
        before = [matmul.fp32_precision for matmul in matmuls]
        assert matmul_error("highest") < 1e-6
        assert [matmul.fp32_precision for matmul in matmuls] == before, (start, dirty)
        assert choose_matmul_precision("high") == torch.get_float32_matmul_precision() == "high"
print("refused", refused)
"""


def test_switches_that_another_package_has_mixed_are_no_error() -> None:
    """In a process of its own, which may leave them so."""
    done = subprocess.run([sys.executable, "-c", _MIXED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 0, "torch refuses none of these any more"
