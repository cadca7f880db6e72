"""Matrices in 4 bits: against the definition, and byte for byte against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.peft.four_bits import (
    NESTED_BLOCK,
    FourBits,
    dequantize,
    dequantize_scales,
    dynamic_levels,
    levels,
    quantize,
)

CPU = torch.device("cpu")


def wide(made: FourBits, kind: str = "nf4") -> Tensor:
    scales = made.scales
    if scales.dtype == torch.uint8:
        places = torch.arange(scales.numel()).view_as(scales)
        scales = dequantize_scales(scales, made.nested, made.offset, places)
    return dequantize(made.codes, scales, kind)


def hard() -> dict[str, Tensor]:
    """Matrices of which something might go wrong."""
    torch.manual_seed(3)
    odd = torch.randn(64, 128)
    odd[3], odd[5], odd[6] = 0, 1e-20, odd[6].sign()
    odd[7, :64] = levels("nf4", CPU).repeat(4)
    ties = torch.zeros(4, 64)
    ties[0, :15], ties[0, 20] = (levels("nf4", CPU)[1:] + levels("nf4", CPU)[:-1]) / 2, 1
    return {
        "many": torch.randn(256, 512),
        "one block": torch.randn(1, 64),
        "few": torch.randn(7, 192),
        "scales far apart": torch.randn(33, 128) * (6 * torch.randn(33, 1)).exp(),
        "alike rows": torch.randn(1, 128).repeat(5, 1),
        "zeros, tiny, saturated, levels": odd,
        "ties": ties,
        "large": torch.randn(8, 64) * 1e30,
    }


@pytest.mark.parametrize("name", hard())
def test_bytes_are_those_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(functional.create_dynamic_map(), dynamic_levels(CPU))
    weight = hard()[name]
    for block in (32, 64):
        theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        made = quantize(weight, "nf4", block, double=False)
        assert torch.equal(theirs.view(-1), made.codes.reshape(-1))
        assert torch.equal(state.absmax, made.scales.view(-1))
        assert torch.equal(functional.dequantize_4bit(theirs, state), wide(made))

        theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=True)
        made = quantize(weight, "nf4", block, double=True)
        assert torch.equal(theirs.view(-1), made.codes.reshape(-1))
        assert torch.equal(state.absmax, made.scales.view(-1)) or len(state.absmax.unique()) == 1  # 0 / 0 there
        assert torch.equal(state.state2.absmax, made.nested) and torch.equal(state.offset.view(1), made.offset)
        assert torch.equal(functional.dequantize_4bit(theirs, state), wide(made))


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_every_weight_has_the_nearest_level_of_its_block(kind: str) -> None:
    for name, weight in hard().items():
        made = quantize(weight, kind, 16, double=False)
        blocks = weight.reshape(-1, 16).double()
        largest = blocks.abs().amax(1, keepdim=True)
        errors = (blocks.unsqueeze(-1) - largest.unsqueeze(-1) * levels(kind, CPU).double()).abs().amin(-1)
        found = (wide(made, kind).double().reshape(-1, 16) - blocks).abs()
        assert ((found - errors) <= 1e-6 * largest).all(), name


def test_bits_of_a_weight() -> None:
    """4.127, as the paper has it, with 8-bit scales; 4.5 without."""
    weight = torch.randn(256, 64 * NESTED_BLOCK)
    bits = {
        double: 8 * sum(one.nbytes for one in quantize(weight, "nf4", 64, double=double)) / weight.numel()
        for double in (True, False)
    }
    assert bits[True] == pytest.approx(4.127, abs=1e-3) and bits[False] == 4.5
    errors = (wide(quantize(weight, "nf4", 64, double=True)) - weight).abs().mean() / weight.abs().mean()
    assert 0.08 < errors < 0.1


def test_what_cannot_be_kept_is_refused() -> None:
    for value in (float("nan"), float("inf"), 3e38):
        with pytest.raises(UserError, match="not finite, or too large"):
            quantize(torch.full((4, 64), value), "nf4", 16, double=True)
