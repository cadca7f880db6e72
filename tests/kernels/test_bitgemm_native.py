"""The compiled products with packed weights against their definition, bit for bit, on every instruction set of this
machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megaforge.kernels.bitgemm import (
    Prepared,
    bit_linear,
    bit_product,
    native,
    pack,
    prepare,
    quantize_activations,
    reference,
)
from megaforge.kernels.native import why_missing
from tests.kernels.test_bitgemm import SCHEMES, some_codes, some_scale

pytestmark = pytest.mark.skipif("cpu" not in native.COMPILED, reason=f"not built: {why_missing('bitgemm', 'cpu')}")


@pytest.fixture(params=["avx512", "avx2", "scalar"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    try:
        prepare(pack(some_codes("ternary", 1, 1), torch.tensor(1.0), "ternary"))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count + columns)
    return (torch.randn(count, columns, generator=generator) * torch.logspace(-3, 3, count)[:, None]).to(dtype)


def defined(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, bits: int = 8) -> Tensor:
    quantized, worth = reference.quantize_activations(x, bits)
    return reference.product(quantized, worth, codes, scale, bias, x.dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_remainder_is_exact(scheme: str) -> None:
    """Tokens around each size of a tile, rows around a panel and a wide one, columns around a step, a word, a block."""
    for count in (1, 2, 3, 5, 9, 13, 27):
        for rows, columns in ((1, 1), (31, 15), (33, 16), (64, 47), (65, 130), (7, 256)):
            codes, scale, x = (
                some_codes(scheme, rows, columns),
                some_scale("rows", rows, columns),
                tokens(count, columns),
            )
            got = bit_linear(x, prepare(pack(codes, scale, scheme)))
            assert torch.equal(got, defined(x, codes, scale)), (count, rows, columns)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns,kind", [(500, "matrix"), (500, "rows"), (130, "groups"), (500, "groups")])
def test_scales_types_biases_and_widths_of_activations(scheme: str, columns: int, kind: str) -> None:
    rows, bias = 70, torch.randn(70, generator=torch.Generator().manual_seed(1))
    codes, scale = some_codes(scheme, rows, columns), some_scale(kind, rows, columns)
    weight = prepare(pack(codes, scale, scheme))
    for count in (1, 14):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = tokens(count, columns, dtype)
            assert torch.equal(bit_linear(x, weight, bias), defined(x, codes, scale, bias))
            assert torch.equal(bit_linear(x, weight, activation_bits=4), defined(x, codes, scale, None, 4))
            quantized, worth = quantize_activations(x)
            assert torch.equal(bit_product(quantized, worth, weight, bias, dtype), bit_linear(x, weight, bias))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 8, 12])
def test_the_largest_sums_do_not_overflow(scheme: str, count: int) -> None:
    columns = 20000
    least, most = reference.RANGES[scheme]
    one = torch.ones(1)
    for code in (least, most):
        weight = prepare(pack(torch.full((40, columns), code, dtype=torch.int8), one[0], scheme))
        for value in (127, -127, -128):
            codes = torch.full((count, columns), value, dtype=torch.int8)
            got = bit_product(codes, torch.ones(count, 1), weight)
            assert got.unique().tolist() == [float(torch.tensor(float(code * value * columns)))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_nan_infinity_and_extremes_stay_in_their_tokens(scheme: str) -> None:
    codes, scale = some_codes(scheme, 70, 100), torch.tensor(0.5)
    weight = prepare(pack(codes, scale, scheme))
    x = tokens(14, 100)
    x[1], x[2, 99], x[3, 0], x[4, 50], x[5, 1], x[6] = 0, torch.nan, torch.inf, -torch.inf, 3e38, 1e-42
    got, want = bit_linear(x, weight), defined(x, codes, scale)
    assert got[2:5].isnan().all() and not got[[1, 6]].any()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 30])
def test_the_number_of_threads_does_not_matter(scheme: str, count: int) -> None:
    x, weight = (
        tokens(count, 1100),
        prepare(pack(some_codes(scheme, 1000, 1100), some_scale("rows", 1000, 1100), scheme)),
    )
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(bit_linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nothing_is_a_matrix_too() -> None:
    weight = prepare(pack(torch.zeros(5, 8, dtype=torch.int8), torch.tensor(1.0), "ternary"))
    assert bit_linear(torch.zeros(0, 8), weight).shape == (0, 5)
    weight = prepare(pack(torch.zeros(0, 8, dtype=torch.int8), torch.tensor(1.0), "ternary"))
    assert bit_linear(torch.zeros(3, 8), weight).shape == (3, 0)


def test_what_was_prepared_elsewhere_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(some_codes("binary", 40, 64), torch.tensor(1.0), "binary")
    rows = Prepared(packed.codes, packed.scheme, packed.shape, packed.scale)
    with pytest.raises(RuntimeError, match="bitgemm_prepare"):
        bit_linear(torch.ones(1, 64), rows)
    if isa == "avx512":
        weight = prepare(packed)
        monkeypatch.setenv("MEGAFORGE_CPU_ISA", "avx2")
        with pytest.raises(RuntimeError, match="look-ups"):
            bit_linear(torch.ones(1, 64), weight)


def test_a_matrix_takes_its_bits() -> None:
    """And what fills up the last panel, step or word."""
    for scheme, most in (("binary", 1.1), ("ternary", 2.01), ("int4", 4.01)):
        weight = prepare(pack(some_codes(scheme, 256, 4096), torch.tensor(1.0), scheme))
        assert weight.num_bytes * 8 <= most * 256 * 4096 + 64, os.environ["MEGAFORGE_CPU_ISA"]
