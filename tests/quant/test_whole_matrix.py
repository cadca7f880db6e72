"""Whole matrices as codes: those that training has, in rows of bits and back."""

from __future__ import annotations

import pytest
import torch

from megaforge.quant.quantizers import WeightScheme, quantize_weight, weight_values
from megaforge.quant.whole_matrix import code_matrix, pack_stack, scale_of, unpack_stack


@pytest.mark.parametrize("kind", ["binary", "ternary", "int4", "int8"])
@pytest.mark.parametrize("shape", [(5, 13), (3, 4, 9), (1, 1)])
def test_rows_of_bits_and_back(kind: str, shape: tuple[int, ...]) -> None:
    least, most = {"binary": (0, 1), "ternary": (-1, 1), "int4": (-8, 7), "int8": (-128, 127)}[kind]
    codes = torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes = codes * 2 - 1 if kind == "binary" else codes
    packed = pack_stack(codes, kind)
    bits = {"binary": 1, "ternary": 2, "int4": 4, "int8": 8}[kind]
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack_stack(packed, kind, shape[-1]), codes)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("experts", [(), (2,)])
def test_each_logical_matrix_has_its_own_step(granularity: str, experts: tuple[int, ...]) -> None:
    weight = torch.randn(*experts, 12, 16, generator=torch.Generator().manual_seed(0))
    weight[..., 4:, :] *= 100
    scheme = WeightScheme("ternary", granularity, 8)
    matrix = code_matrix(weight, (4, 6, 2), scheme)
    for rows, number in ((slice(0, 4), 0), (slice(4, 10), 1), (slice(10, 12), 2)):
        codes, step = quantize_weight(weight[..., rows, :], "ternary", None, granularity, 8)
        assert torch.equal(matrix.codes[..., rows, :], codes)
        own = (
            matrix.step[..., number]
            if granularity == "tensor"
            else matrix.step[(..., rows, slice(None))[: 3 if granularity == "group" else 2]]
        )
        assert torch.equal(own, step)
    values = weight_values(matrix.codes, scale_of(matrix, (4, 6, 2), scheme), scheme)
    assert values.shape == weight.shape and torch.equal(values.sign(), matrix.codes.float())


def test_asymmetric_levels_keep_the_code_of_zero() -> None:
    weight = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    scheme = WeightScheme("int4", asymmetric=True)
    matrix = code_matrix(weight, (), scheme)
    assert matrix.zero is not None and matrix.zero.shape == (1,) and float(matrix.zero) == -8
    assert (weight_values(matrix.codes, scale_of(matrix, (), scheme), scheme) - weight).abs().max() < float(matrix.step)
