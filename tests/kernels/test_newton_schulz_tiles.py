"""The iteration by bands of symmetric products is that of whole products, with fewer multiplications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.newton_schulz import coefficients, native, newton_schulz, reference, tiles

ONE = coefficients("quintic", 1)


def test_it_is_the_iteration_with_fewer_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    x = reference.normalize(torch.randn(2, 520, 530, generator=torch.Generator().manual_seed(0)), 1e-7)
    x[1, 3, 5] = torch.nan
    want, done, bmm, baddbmm = reference.standard(x, ONE), [0], torch.bmm, torch.baddbmm

    def count(a: Tensor, b: Tensor) -> None:
        done[0] += a.shape[1] * a.shape[2] * b.shape[2]

    monkeypatch.setattr(torch, "bmm", lambda a, b: (count(a, b), bmm(a, b))[1])
    monkeypatch.setattr(torch, "baddbmm", lambda c, a, b, **f: (count(a, b), baddbmm(c, a, b, **f))[1])
    got = tiles.standard(x, ONE)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-6)
    assert got[1].isnan().any()
    assert done[0] < 0.78 * 520 * 520 * (2 * 530 + 520)  # five bands: 0.6 of two of the three products


@pytest.mark.parametrize(("side", "dtype"), [(20, torch.float32), (520, torch.bfloat16)])
def test_where_it_does_not_pay_products_are_whole(
    side: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "standard", lambda x, steps: x * 0 + 7)
    assert bool((tiles.standard(torch.ones(1, side, side, dtype=dtype), ONE) == 7).all())


def test_a_cpu_takes_it_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "standard", lambda x, steps: x * 0 + 7)
    assert bool((newton_schulz(torch.ones(4, 6, dtype=torch.float64)) == 7).all())
    x = torch.ones(1, 4, 6)
    assert bool((native._orthogonalize(x, [1.0, 2.0, 3.0], False, True, 1e-7) == 7).all())
