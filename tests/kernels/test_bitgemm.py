"""Products with packed weights: packing there and back, quantized activations, the definition against integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels import bitgemm
from megaforge.kernels.bitgemm import (
    Packed,
    bit_linear,
    bit_product,
    dequantize,
    pack,
    prepare,
    quantize_activations,
    reference,
    unpack,
)

SCHEMES = ("binary", "ternary", "int4")


def some_codes(scheme: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if scheme == "binary":
        return (torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1).to(torch.int8)
    least, most = (-1, 1) if scheme == "ternary" else (-8, 7)
    return torch.randint(least, most + 1, (rows, columns), generator=generator).to(torch.int8)


def some_scale(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    shape = {"matrix": (), "rows": (rows,), "groups": (rows, 2)}[kind]
    return torch.rand(shape, generator=generator) + 0.1


def integers(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int = 8) -> Tensor:
    """The same by whole numbers, as one reads it in the paper."""
    quantized, worth = quantize_activations(x, bits)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    total = torch.zeros(x.shape[0], codes.shape[0])
    for group, (some, part) in enumerate(zip(quantized.chunk(groups, 1), codes.chunk(groups, 1), strict=True)):
        sums = some.long() @ part.long().T
        total = total + sums.float() * (scale[:, group] if scale.dim() == 2 else scale)
    total = total * worth
    return (total if bias is None else total + bias).to(x.dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_packing_there_and_back(scheme: str, columns: int) -> None:
    codes = some_codes(scheme, 5, columns)
    packed = pack(codes, torch.tensor(0.5), scheme)
    assert torch.equal(unpack(packed), codes) and torch.equal(dequantize(packed), codes * 0.5)
    assert packed.num_bytes == 5 * -(-columns * bitgemm.BITS[scheme] // 8) + 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_two_ways_to_pack_are_one(scheme: str) -> None:
    """Whole bytes of codes are packed together, other rows one code after the other."""
    for rows, columns in ((3, 8), (1, 40), (4, 0), (0, 8)):
        codes = some_codes(scheme, rows, columns)
        packed = reference.pack_codes(codes, scheme)
        assert torch.equal(packed, reference._pack_any(codes, scheme))
        assert torch.equal(reference.unpack_codes(packed, scheme, columns), codes)
        assert torch.equal(reference._unpack_any(packed, scheme, columns), codes)
    wide = some_codes(scheme, 6, 24)
    assert torch.equal(reference.pack_codes(wide[1:2, 8:16], scheme), reference._pack_any(wide[1:2, 8:16], scheme))


def test_the_rows_of_files() -> None:
    """These bytes are in files: they never change."""
    binary = torch.tensor([[1, -1, -1, 1, 1, 1, -1, -1, 1]], dtype=torch.int8)
    assert pack(binary, torch.tensor(1.0), "binary").codes.tolist() == [[0b00111001, 1]]
    ternary = torch.tensor([[-1, 0, 1, 1, 1]], dtype=torch.int8)
    assert pack(ternary, torch.tensor(1.0), "ternary").codes.tolist() == [[0b10100100, 0b10]]
    four = torch.tensor([[-8, 7, -1]], dtype=torch.int8)
    assert pack(four, torch.tensor(1.0), "int4").codes.tolist() == [[0x78, 0x0F]]


def test_scales_of_groups_belong_to_neighbours() -> None:
    packed = pack(torch.ones(2, 6, dtype=torch.int8), torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "ternary")
    assert dequantize(packed).tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]


@pytest.mark.parametrize(
    "codes,scheme,scale,word",
    [
        ([[1, 0]], "binary", [], "do not include 0"),
        ([[2, 0]], "ternary", [], "do not include 2"),
        ([[1, -9]], "int4", [], "do not include -9"),
        ([[1, 1]], "octal", [], "octal"),
        ([[1, 1]], "ternary", [3], "scales"),
        ([[1, 1, 1]], "ternary", [1, 2], "scales"),
    ],
)
def test_what_does_not_fit_is_refused(codes: list[list[int]], scheme: str, scale: list[int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pack(torch.tensor(codes, dtype=torch.int8), torch.ones(scale), scheme)


def test_other_faults_are_refused() -> None:
    packed = pack(some_codes("ternary", 3, 8), torch.tensor(1.0), "ternary")
    weight = prepare(packed)
    for call, word in (
        (lambda: Packed(packed.codes[:, :1], "ternary", (3, 8), packed.scale), "codes uint8"),
        (lambda: bit_linear(torch.ones(2, 7), weight), "expected"),
        (lambda: bit_linear(torch.ones(2, 8).double(), weight), "expected"),
        (lambda: bit_linear(torch.ones(2, 8), weight, activation_bits=5), "4 or 8 bits"),
        (lambda: bit_product(torch.ones(2, 8), torch.ones(2, 1), weight), "int8 codes"),
        (lambda: bit_product(torch.ones(2, 8).to(torch.int8), torch.ones(2), weight), "int8 codes"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_activations_are_rounded_as_torch_does_in_bitnet() -> None:
    """As in the published code, whose 127 / x is x.reciprocal() * 127 in torch."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-7, 30, 200)[:, None]
    for bits, most in ((8, 127), (4, 7)):
        factor = most / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        codes, worth = quantize_activations(x, bits)
        assert torch.equal(codes, (x * factor).round().clamp(-most - 1, most).to(torch.int8))
        torch.testing.assert_close(worth * factor, torch.ones_like(worth))
    assert quantize_activations(torch.tensor([[0.5, 1.5, 127, -2.5]]))[0].tolist() == [[0, 2, 127, -2]]
    codes, worth = quantize_activations(torch.zeros(1, 3))
    assert not codes.any() and worth.item() == pytest.approx(1e-5 / 127)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["matrix", "rows", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_whole_numbers(scheme: str, kind: str, dtype: torch.dtype) -> None:
    rows, columns = 37, 50
    codes, scale = some_codes(scheme, rows, columns), some_scale(kind, rows, columns)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    weight = prepare(pack(codes, scale, scheme))
    for some_bias, bits in ((None, 8), (bias, 8), (bias, 4)):
        got = bit_linear(x, weight, some_bias, bits)
        assert got.dtype == dtype and got.shape == (2, 3, rows)
        want = integers(x.flatten(0, 1), codes, scale, some_bias, bits)
        assert torch.equal(got.flatten(0, 1), want)
        quantized, worth = quantize_activations(x, bits)
        assert torch.equal(bit_product(quantized, worth, weight, some_bias, dtype), got)


def test_the_product_is_near_to_that_of_floats() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    packed = pack(some_codes("ternary", 64, 256), torch.tensor(0.02), "ternary")
    want = x @ dequantize(packed).T
    assert float((bit_linear(x, prepare(packed)) - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_and_infinity_stay_in_their_tokens(scheme: str) -> None:
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(5))
    weight = prepare(pack(some_codes(scheme, 9, 20), torch.tensor(1.0), scheme))
    clean = bit_linear(x, weight)
    x[1, 3], x[2, 19], x[3] = torch.nan, -torch.inf, 0
    got = bit_linear(x, weight)
    assert got[1].isnan().all() and got[2].isnan().all() and not got[3].any()
    assert torch.equal(got[[0, 4]], clean[[0, 4]])
