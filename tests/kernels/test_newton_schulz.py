"""Newton-Schulz iterations: what comes out has the input's singular vectors and singular values near one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.kernels.newton_schulz import coefficients, gram_polynomial, native, newton_schulz, reference

STEPS = coefficients("polar_express", 5)
# (m, n) with both sides' multiples of nothing, and the least.
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 5), (33, 47), (47, 33), (64, 64), (100, 401)]


def spectrum(name: str, m: int) -> Tensor:
    k = torch.arange(1, m + 1, dtype=torch.float64)
    return {
        "1/k": 1 / k,
        "1/k^2": 1 / k**2,
        "exp": torch.exp(torch.linspace(0.0, -13.8, m, dtype=torch.float64)),
        "rank 32": torch.where(k <= 32, 1.0, 1e-3).double(),
    }[name]


def matrix(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    """fp64 [m, n], m <= n, of a spectrum."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(m, n, dtype=torch.float64, generator=generator)
    if name == "gauss":
        return gauss
    u, _, v = torch.linalg.svd(gauss, full_matrices=False)
    return u @ torch.diag(spectrum(name, m)) @ v


SPECTRA = ("gauss", "1/k", "1/k^2", "exp", "rank 32")


def oracle(x: Tensor, steps=STEPS) -> Tensor:
    """By singular values, in fp64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / max(float(s.norm()), 1e-7)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_fp64_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], algorithm: str) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = newton_schulz(x, coefficient_type="polar_express", algorithm=algorithm)
    torch.testing.assert_close(got, oracle(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("n", [256, 1024])
def test_precisions_are_as_exact_as_they_should_be(name: str, n: int) -> None:
    """bf16 and split: at least as near to fp64 as torch's own bf16 products; fp32: 5e-5, its Gram way 0.5 %."""
    x = matrix(name, 256, n)
    want = oracle(x)
    plain = error(reference.standard(reference.normalize(x[None], 1e-7).bfloat16(), STEPS)[0], want)
    x32 = x.float()
    found = {
        (algorithm, precision): newton_schulz(
            x32, coefficient_type="polar_express", algorithm=algorithm, precision=precision
        )
        for algorithm, precision in (("standard", "bf16"), ("gram", "split"), ("standard", "fp32"), ("gram", "fp32"))
    }
    errors = {kind: error(result, want) for kind, result in found.items()}
    # Sums in another order: a little better or worse by chance where both are the same arithmetic.
    assert errors["standard", "bf16"] <= 1.02 * plain
    assert errors["gram", "split"] <= plain
    assert errors["standard", "fp32"] <= 5e-5
    assert errors["gram", "fp32"] <= 5e-3
    largest = float(torch.linalg.matrix_norm(want, 2))
    for kind, result in found.items():
        assert float(torch.linalg.matrix_norm(result.double(), 2)) <= largest + 0.03, kind


@pytest.mark.parametrize(
    "kind,least,band",
    [
        ("simple", 1e-2, (0.68, 1.13)),
        ("quintic", 1e-2, (0.98, 1.03)),
        ("polar_express", 1e-3, (0.85, 1.14)),
        ("cans", 1e-3, (0.88, 1.12)),
    ],
)
def test_singular_values_lie_in_the_published_bands(kind: str, least: float, band: tuple[float, float]) -> None:
    m = 64
    u, _, v = torch.linalg.svd(torch.randn(m, 100, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    s = torch.logspace(0, -3, m)
    x = u @ torch.diag(s) @ v
    normalised = s / s.norm()
    for precision, slack in (("fp32", 0.01), ("bf16", 0.03)):
        result = newton_schulz(x, coefficient_type=kind, algorithm="standard", precision=precision)
        values = torch.linalg.svdvals(u.T @ result @ v.T)
        inside = torch.diag(u.T @ result @ v.T)[normalised >= least]
        assert band[0] - slack <= float(inside.min()) and float(values.max()) <= max(band[1], 1.21) + slack
        if kind not in ("simple",):
            assert float(values.max()) <= 1.16 + slack


@pytest.mark.parametrize("precision,algorithm", [("bf16", "standard"), ("fp32", "standard"), ("split", "gram")])
def test_a_batch_is_a_loop_at_any_number_of_threads(precision: str, algorithm: str) -> None:
    x = torch.randn(5, 70, 300, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(newton_schulz(x, precision=precision, algorithm=algorithm))
            results.append(torch.stack([newton_schulz(one, precision=precision, algorithm=algorithm) for one in x]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("precision", ["bf16", "fp32", "split", "fp64"])
def test_zeros_give_zeros_and_nan_stays_in_its_matrix(precision: str) -> None:
    x = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(4)).double()
    x[1] = 0
    x[2, 3, 5] = torch.nan
    x[3, 0, 0] = torch.inf
    result = newton_schulz(x if precision == "fp64" else x.float(), precision=precision)
    assert torch.isfinite(result[0]).all() and not result[1].any()
    assert result[2].isnan().any() and result[3].isnan().any()


@pytest.mark.parametrize("scale", [1e-5, 1e18, 3e30])
def test_scale_does_not_matter(scale: float) -> None:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    for precision in ("fp32", "bf16"):
        torch.testing.assert_close(
            newton_schulz(x * scale, precision=precision), newton_schulz(x, precision=precision), rtol=0, atol=0.02
        )


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "split"])
def test_every_instruction_set_computes_the_same(isa: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cpu" not in native.COMPILED:
        pytest.skip("the CPU code is not built")
    x = torch.randn(2, 40, 210, generator=torch.Generator().manual_seed(9))
    want = torch.stack([oracle(one, coefficients("quintic", 5)) for one in x])
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", isa)
    try:
        got = newton_schulz(x, precision=precision)
    except RuntimeError as failure:
        pytest.skip(str(failure))
    assert error(got, want) < (0.03 if precision != "fp32" else 2e-3)


def test_rank_one_alike_rows_and_columns() -> None:
    alike = torch.ones(30, 50)
    # All elements are rounded to bf16 the same way, and a singular value that is not 1 lands elsewhere in the band.
    for precision, most in (("bf16", 0.2), ("fp32", 1e-4), ("split", 0.2)):
        result = newton_schulz(alike, precision=precision, coefficient_type="polar_express").double()
        assert error(result, oracle(alike)) < most


def test_strided_and_narrow_inputs_come_back_in_their_type() -> None:
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(6))
    want = newton_schulz(x.T.contiguous())
    assert torch.equal(newton_schulz(x.T), want)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        result = newton_schulz(x.to(dtype))
        assert (
            result.dtype == dtype
            and result.is_contiguous()
            and error(result, oracle(x, coefficients("quintic", 5))) < 0.05
        )
    assert newton_schulz(x[:0]).shape == (0, 60) and newton_schulz(x.new_empty(0, 3, 4)).shape == (0, 3, 4)


def test_gram_polynomial_makes_the_same_result_from_parts() -> None:
    x = reference.normalize(
        torch.randn(2, 20, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(7)), 1e-7
    )
    parts = x.chunk(3, dim=2)
    gram = sum(torch.bmm(part, part.mT) for part in parts)
    q = gram_polynomial(gram, coefficient_type="polar_express")
    got = torch.cat([torch.bmm(q, part) for part in parts], 2)
    torch.testing.assert_close(got, reference.standard(x, STEPS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrices_of_16_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"in fp32 or fp64, got torch.*float16 \[1, 4, 4\]"):
        gram_polynomial(torch.eye(4, dtype=dtype)[None])
    with pytest.raises(ValueError, match=r"got torch.float32 \[1, 4, 5\]"):
        gram_polynomial(torch.ones(1, 4, 5))


@pytest.mark.parametrize("scale", [1e-300, 1e-5, 1e160, 1e300])
def test_fp64_norms_do_not_overflow(scale: float) -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[1] = 0
    found = reference.normalize(x * scale, 1e-7)
    want = x / 1e-7 * scale if scale < 1e-7 else reference.normalize(x, 1e-7)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=0)


def test_equal_to_torch_where_it_offers_the_same() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(8))
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = newton_schulz(x, coefficient_type="simple", precision="bf16", algorithm="standard")
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0.02)


def test_what_cannot_be_is_refused_by_name() -> None:
    x = torch.randn(4, 4)
    for arguments, said in (
        ({"coefficient_type": "quint"}, "'quint' is not a type of coefficients"),
        ({"coefficient_type": "polar_express", "steps": 4}, "use at least 5"),
        ({"coefficient_type": "custom"}, "'custom'"),
        ({"custom": [(1.0, 0.0, 0.0)]}, "'custom'"),
        ({"coefficient_type": "custom", "custom": []}, "at least one triple"),
        ({"steps": 0}, "at least 1"),
        ({"algorithm": "fast"}, "algorithm 'fast'"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"algorithm": "gram", "precision": "bf16"}, "does not go with"),
        ({"algorithm": "standard", "precision": "split"}, "does not go with"),
    ):
        with pytest.raises(UserError, match=said):
            newton_schulz(x, **arguments)  # type: ignore[arg-type]
    custom = newton_schulz(x.double(), coefficient_type="custom", custom=[(1.5, -0.5, 0.0)], steps=30)
    torch.testing.assert_close(custom @ custom.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
