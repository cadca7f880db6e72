"""Activations in 8 bits: how near they come back, what is left alone, and what a run does with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.nn.compressed import BLOCK, CompressedActivations
from megaforge.planning.measured_activations import CASES, compare
from megaforge.verification.compression import effects

CASE = "cdrmix-tiny, --recompute selective --compress-activations"


def kept_as(x: Tensor, weights: tuple[Tensor, ...] = ()) -> Tensor:
    """What the backward pass is given of ``x``."""
    y = torch.ones_like(x).requires_grad_()
    with CompressedActivations(weights):
        product = y * x
    return torch.autograd.grad(product.sum(), y)[0]


def coded(x: Tensor) -> Tensor:
    """The reference, number by number."""
    result = x.double().clone().reshape(-1, BLOCK)
    for row in result:
        scale = float(row.abs().max()) / 127
        for place, value in enumerate(row.tolist()):
            row[place] = round(value / scale) * scale if scale else 0.0
    return result.reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 128), (1, 64), (5, 192)])
def test_numbers_are_the_nearest_of_127_steps(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, shape[-1])
    x = x.to(dtype)
    x[0, ..., 0] = 0.0
    found = kept_as(x)
    assert found.dtype == dtype
    largest = x.double().unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    bound = (largest / 254 * (1 + 1e-5) + largest * torch.finfo(dtype).eps).expand(*largest.shape[:-1], BLOCK)
    assert bool(((found.double() - x.double()).abs() <= bound.flatten(-2)).all())
    if dtype == torch.float64:
        torch.testing.assert_close(found, coded(x), rtol=1e-12, atol=0)


def test_zeros_extremes_and_overflows() -> None:
    x = torch.zeros(5, BLOCK)
    x[1] = 3e38
    x[2, 3] = float("inf")
    x[3, 3] = float("nan")
    x[4] = 1e-44
    found = kept_as(x)
    assert not found[0].any()
    torch.testing.assert_close(found[1], x[1])
    assert bool(found[2:4].isnan().all())
    assert float(found[4].abs().max()) <= 1e-43


def test_a_token_does_not_depend_on_others() -> None:
    x = torch.randn(4, 3, 128)
    whole = kept_as(x)
    x[1:] *= 1e6
    assert torch.equal(kept_as(x)[:1], whole[:1])
    assert torch.equal(torch.cat([kept_as(part) for part in x.split(64, -1)], -1), kept_as(x))


@pytest.mark.parametrize("shape", [(4, 3), (4, 65), (64,), (0, 64)])
def test_statistics_and_odd_widths_stay_exact(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(kept_as(x), x)


def test_weights_stay_exact() -> None:
    x = torch.randn(4, 64)
    assert torch.equal(kept_as(x, (x,)), x)
    assert not torch.equal(kept_as(x), x)


def test_a_tensor_is_coded_once_until_it_changes() -> None:
    y = torch.ones(2, 64, requires_grad=True)
    x = torch.randn(2, 64)
    first = x.clone()
    with CompressedActivations(()):
        one, other = y * x, y * x
        x.mul_(3)
        changed = y * x
    saved = [p.grad_fn._raw_saved_other.data for p in (one, other)] if hasattr(one.grad_fn, "_raw_saved_other") else []
    assert all(found is saved[0] for found in saved)
    torch.testing.assert_close(torch.autograd.grad(one.sum(), y)[0], kept_as(first))
    torch.testing.assert_close(torch.autograd.grad(changed.sum(), y)[0], kept_as(3 * first))


def test_gradients_move_a_little() -> None:
    found = effects("parity", ("--hidden-size", "64"))
    assert 1e-5 < found["all"].error < 0.03
    assert found["all"].cosine > 0.9995


def test_the_plan_knows_what_is_kept() -> None:
    found, plain = compare(CASES[CASE]), compare(CASES["cdrmix-tiny, --recompute selective"])
    assert abs(found.error) < 0.05
    assert found.measured < 0.5 * plain.measured
