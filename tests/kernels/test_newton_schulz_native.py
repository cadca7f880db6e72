"""The compiled Newton-Schulz iterations for CPUs against their definition, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaforge.kernels.native import why_missing
from megaforge.kernels.newton_schulz import coefficients, gram_polynomial, native, newton_schulz, reference

pytestmark = pytest.mark.skipif(
    "cpu" not in native.COMPILED, reason=f"not built: {why_missing('newton_schulz', 'cpu')}"
)
STEPS = coefficients("polar_express", 5)
# Less than a panel, one row and column more than a block, several blocks with remainders, and the depth in two goes.
SHAPES = [(1, 1), (1, 40), (17, 33), (129, 193), (70, 850)]


@pytest.fixture(params=["avx512", "avx2", "scalar"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    try:
        newton_schulz(torch.ones(1, 1))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_each_way_is_as_near_to_float64_as_its_definition(shape: tuple[int, int]) -> None:
    x = normal(2, *shape)
    start = reference.normalize(x, 1e-7)
    want = reference.standard(reference.normalize(x.double(), 1e-7), STEPS)
    narrow = start.bfloat16()
    rounded = error(reference.standard(narrow, STEPS), want), error(reference.by_gram_split(narrow, STEPS), want)
    for gram, bf16, most in (
        (False, False, 5e-5),
        (True, False, 5e-3),
        (False, True, 1.1 * rounded[0] + 4e-3),
        (True, True, 1.1 * rounded[1] + 4e-3),
    ):
        got = native.orthogonalize(x, STEPS, gram=gram, narrow=bf16, eps=1e-7)
        assert error(got, want) <= most, (gram, bf16)


def test_the_polynomial_of_a_gram_matrix() -> None:
    x = reference.normalize(normal(2, 50, 60).double(), 1e-7)
    gram = x @ x.mT
    got = gram_polynomial(gram.float(), coefficient_type="polar_express")
    assert error(got, reference.gram_polynomial(gram, STEPS)) < 2e-3


@pytest.mark.parametrize("way", [(False, True), (False, False), (True, True), (True, False)])
def test_one_large_matrix_is_the_same_on_any_number_of_threads(way: tuple[bool, bool]) -> None:
    x = normal(1, 150, 420)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(native.orthogonalize(x, STEPS, gram=way[0], narrow=way[1], eps=1e-7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_vanish_nor_overflow(scale: float) -> None:
    x = normal(1, 20, 90)
    want = native.orthogonalize(x, STEPS, gram=False, narrow=False, eps=0.0)
    got = native.orthogonalize(x * scale, STEPS, gram=False, narrow=False, eps=0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    tiny = native.orthogonalize(x * 1e-30, STEPS, gram=False, narrow=False, eps=1e-7)
    assert tiny.isfinite().all() and float(tiny.abs().max()) < 1e-15


@pytest.mark.parametrize("way", [(False, True), (False, False), (True, True), (True, False)])
def test_zeros_nan_and_infinity_stay_in_their_matrices(way: tuple[bool, bool]) -> None:
    x = normal(4, 20, 90)
    alone = native.orthogonalize(x[:1], STEPS, gram=way[0], narrow=way[1], eps=1e-7)
    x[1] = 0
    x[2, 3, 5] = torch.nan
    x[3, 19, 89] = torch.inf
    got = native.orthogonalize(x, STEPS, gram=way[0], narrow=way[1], eps=1e-7)
    assert torch.equal(got[:1], alone) and not got[1].any()
    assert got[2].isnan().all() and got[3].isnan().all()
