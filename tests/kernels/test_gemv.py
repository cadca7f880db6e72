"""Products with a few vectors: the definition's numbers, whatever the matrix's layout; hard values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megaforge.kernels.gemv import MOST_VECTORS, gemv, is_compiled
from megaforge.kernels.gemv.reference import linear


def matrix(n: int, k: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    if kind == "turned":
        return torch.randn(k, n, dtype=torch.float64).to(dtype).t()
    if kind == "part":
        return torch.randn(n, 2 * k + 3, dtype=torch.float64).to(dtype)[:, 3 : 3 + k]
    if kind == "spread":  # neither rows nor columns lie together
        return torch.randn(n, 2 * k, dtype=torch.float64).to(dtype)[:, ::2]
    return torch.randn(n, k, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", ["rows", "turned", "part", "spread"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_it_is_the_definition(dtype: torch.dtype, within: float, kind: str) -> None:
    torch.manual_seed(1)
    for vectors in (*range(1, MOST_VECTORS + 1), MOST_VECTORS + 3):
        weight, x = matrix(37, 83, dtype, kind), torch.randn(vectors, 83).to(dtype)
        bias = torch.randn(37).to(dtype) if vectors % 2 else None
        want = linear(x.double(), weight.double(), None if bias is None else bias.double())
        got = gemv(x, weight, bias)
        assert got.dtype == dtype and got.shape == want.shape
        assert float((got.double() - want).norm()) <= within * float(want.norm())


def test_leading_dimensions_and_other_types() -> None:
    torch.manual_seed(2)
    weight = torch.randn(5, 7)
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(gemv(x, weight), F.linear(x, weight))
    assert gemv(x[:0], weight).shape == (0, 3, 5)
    assert gemv(x[0, 0], weight).shape == (5,)
    assert torch.equal(gemv(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert gemv(torch.zeros(2, 0), torch.zeros(5, 0), torch.ones(5)).tolist() == [[1.0] * 5] * 2


@pytest.mark.skipif(not is_compiled("cpu"), reason="no compiled code: torch's product is what there is")
def test_hard_values() -> None:
    """One thread or two, alike rows, sums that cancel, values whose products overflow, NaN where it belongs."""
    torch.manual_seed(3)
    weight = torch.randn(300, 513)
    x = torch.randn(1, 513)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gemv(x, weight)
        torch.set_num_threads(2)
        assert torch.equal(gemv(x, weight), one)
    finally:
        torch.set_num_threads(before)
    alike = gemv(x, weight[:1].expand(9, -1))
    assert torch.equal(alike, alike[:, :1].expand_as(alike))
    assert torch.equal(gemv(torch.tensor([[1e30, -1e30, 0.0]]), torch.ones(2, 3)), torch.zeros(1, 2))
    huge = gemv(torch.full((2, 4), 3e38), torch.tensor([[1.0] * 4, [0.0] * 4]))
    assert huge.isinf()[:, 0].all() and torch.equal(huge[:, 1], torch.zeros(2))
    odd = torch.ones(3, 40)
    odd[1, 39] = float("nan")
    assert torch.equal(gemv(odd, torch.ones(2, 40)).isnan(), torch.tensor([[False] * 2, [True] * 2, [False] * 2]))


def test_it_has_a_shape_without_values() -> None:
    torch.library.opcheck(
        torch.ops.megaforge.gemv.default,
        (torch.randn(2, 6), torch.randn(3, 6), None),
        test_utils=("test_schema", "test_faketensor"),
    )
