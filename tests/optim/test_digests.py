"""Digests of tensors do not know how a tensor is cut, and see every bit of it."""

from __future__ import annotations

import pytest
import torch

from megaforge.optim import digests
from megaforge.optim.digests import hashed, hashed_rows


def whole(value: torch.Tensor) -> int:
    return hashed(value, tuple((0, size) for size in value.shape), value.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [
        hashed(value[a:b, c:d], ((a, b), (c, d), (0, 3)), value.shape)
        for a, b in ((0, 2), (2, 2), (2, 7))
        for c, d in ((0, 4), (4, 5))
    ]
    assert sum(parts) % 2**64 == whole(value)
    monkeypatch.setattr(digests, "_AT_ONCE", 16)  # a row at a time
    assert whole(value) == sum(parts) % 2**64


def test_every_bit_and_place_counts() -> None:
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    found = {whole(value)}
    for place in range(value.numel()):
        other = value.clone()
        other.view(torch.int32).view(-1)[place] ^= 1
        found.add(whole(other))
    swapped = value.clone()
    swapped[0], swapped[1] = value[1], value[0]
    found |= {whole(swapped), whole(value.t().contiguous()), whole(-value)}
    assert len(found) == 1 + value.numel() + 3
    assert whole(torch.zeros(3)) != whole(torch.zeros(4)) or whole(torch.zeros(3)) != whole(-torch.zeros(3))
    assert hashed(torch.zeros(0, 4), ((0, 0), (0, 4)), (6, 4)) == 0
    assert hashed(torch.tensor(1.0), (), ()) != hashed(torch.tensor(2.0), (), ())


def test_rows_have_no_order() -> None:
    rows = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    assert hashed_rows(rows) == hashed_rows(rows.flatten(0, 1).flip(0)) == hashed_rows(rows[0]) + hashed_rows(rows[1])
    other = rows.clone()
    other.view(torch.int32)[1, 2, 3] ^= 1
    assert hashed_rows(rows) != hashed_rows(other) and hashed_rows(rows) != hashed_rows(rows.flip(-1))
