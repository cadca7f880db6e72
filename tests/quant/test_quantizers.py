"""Quantizers against their definitions in plain fp64, at ordinary and at odd weights and tokens."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from megaforge.kernels.bitgemm import reference
from megaforge.quant.noise import uniform
from megaforge.quant.quantizers import (
    ActivationScheme,
    WeightScheme,
    activation_codes,
    activation_range,
    activation_values,
    quantize_weight,
    weight_codes,
    weight_scale,
    weight_statistics,
    weight_values,
)
from megaforge.quant.rotation import hadamard_matrix, rotate


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def defined(kind: str, block: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Codes and values of weights that share a step, as published."""
    if kind == "binary":
        codes = torch.where(block >= block.mean(), 1.0, -1.0).to(block.dtype)
        return codes, codes * block.abs().mean()
    if kind == "ternary":
        s = 1.0 / block.abs().mean().clamp(min=1e-5)
        codes = (block * s).round().clamp(-1, 1)
        return codes, codes / s
    bits = {"int4": 4, "int8": 8}[kind]
    if not asymmetric:
        step = block.abs().max() / (2 ** (bits - 1) - 1)
        codes = (block / step).round()
        return codes, codes * step
    low, high = block.min().clamp(max=0), block.max().clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    level = ((block / step).round() + zero).clamp(0, 2**bits - 1)
    return level - 2 ** (bits - 1), (level - zero) * step


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize(
    ("kind", "asymmetric"),
    [("binary", False), ("ternary", False), ("int4", False), ("int8", False), ("int4", True), ("int8", True)],
)
def test_weights_are_quantized_as_defined(kind: str, asymmetric: bool, granularity: str) -> None:
    scheme = WeightScheme(kind, granularity, 4, asymmetric)
    for w in (random(3, 5, 12), random(2, 1, 4, seed=1) + 0.3, random(1, 4, 8, seed=2) * 1e-7, random(1, 2, 4) * 1e6):
        scale = weight_scale(weight_statistics(w, scheme), scheme, w.dtype)
        codes = weight_codes(w, scale, scheme)
        values = weight_values(codes, scale, scheme)
        blocks = {
            "tensor": [w[e] for e in range(len(w))],
            "channel": list(w.flatten(0, 1)),
            "group": list(w.view(-1, 4)),
        }[granularity]
        expected = [defined(kind, block, asymmetric) for block in blocks]
        assert codes.dtype == torch.int8
        assert torch.equal(codes.double().flatten(), torch.cat([c.flatten() for c, _ in expected]))
        theirs = torch.cat([v.flatten() for _, v in expected])
        torch.testing.assert_close(values.flatten(), theirs, rtol=1e-14, atol=0)
        narrow = w.float()
        of_narrow = weight_scale(weight_statistics(narrow, scheme), scheme, torch.float32)
        assert of_narrow.step.dtype == torch.float32
        assert (weight_codes(narrow, of_narrow, scheme) == codes).double().mean() > 0.9


def test_ternary_codes_are_bit_for_bit_those_of_the_published_code() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = random(64, 96, dtype=dtype)
        codes, step = quantize_weight(w, "ternary")
        s = 1.0 / w.float().double().abs().mean().float().clamp(min=1e-5)
        assert torch.equal(codes, (w.float() * s).round().clamp(-1, 1).to(torch.int8))
        assert step.shape == () and step.dtype == torch.float32
        again, same = quantize_weight(w, "ternary", step)
        assert torch.equal(again, codes) and torch.equal(same, step)


def test_shapes_of_steps_are_those_that_packing_takes() -> None:
    w = random(3, 6, 8)
    assert [quantize_weight(w, "int4", None, g, 2)[1].shape for g in ("tensor", "channel", "group")] == [
        (3,), (3, 6), (3, 6, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "ternary", "int4", "int8"])
def test_odd_weights(kind: str) -> None:
    scheme = WeightScheme(kind)

    def values(w: Tensor, how: WeightScheme = scheme) -> Tensor:
        scale = weight_scale(weight_statistics(w, how), how, w.dtype)
        return weight_values(weight_codes(w, scale, how), scale, how)

    assert not values(torch.zeros(3, 4)).any()
    for odd in (float("nan"), float("inf"), -float("inf")):
        w = random(2, 3, 4, dtype=torch.float32)
        w[0, 1, 2] = odd
        found = values(w)
        assert bool(found[0].isnan().all()) and bool(found[1].isfinite().all())
    half = WeightScheme(kind, scale_dtype=torch.float16)
    step = weight_scale(weight_statistics(random(8, 8), half), half, torch.float32).step
    assert torch.equal(step, step.half().float())
    assert torch.equal(
        values(torch.full((2, 3), 1e-10), half) == 0, torch.full((2, 3), True)
    )  # a step too small for it


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_activations_are_those_of_packed_kernels(bits: int) -> None:
    scheme = ActivationScheme(bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = random(7, 3, 33, dtype=dtype)
        x[0] = 0
        if dtype != torch.float64:  # whose halves lie elsewhere
            x[1] = torch.linspace(-1, 1, 33, dtype=dtype)
        x[2, 0, 0] *= 30000
        codes, step = activation_codes(x, activation_range(x, scheme), scheme)
        theirs, worth = reference.quantize_activations(x, bits)
        assert torch.equal(codes, theirs) and torch.equal(step, worth)


@pytest.mark.parametrize("scheme", [ActivationScheme(8), ActivationScheme(4), ActivationScheme(8, asymmetric=True)])
def test_the_last_bit_of_a_sum_moves_no_code_in_fp64(scheme: ActivationScheme) -> None:
    """Of whole multiples of a step, many of which lie on a half: what a token alone in attention gives."""
    most = 2 * scheme.largest_code + scheme.asymmetric
    x = torch.arange(-most, most + 1).double() * torch.tensor([[1.0], [0.1], [1 / 3]]).double()
    codes, step = activation_codes(x, activation_range(x, scheme), scheme)
    on_half = ((x / step[..., :1]).remainder(1) - 0.5).abs() < 1e-9
    assert int(on_half.sum()) >= 3 * (most - 1)
    for rounding in (-1e-14, 1e-14):
        moved = x * (1 + rounding * torch.linspace(-1, 1, 2 * most + 1, dtype=torch.float64))
        assert torch.equal(activation_codes(moved, activation_range(moved, scheme), scheme)[0], codes)
    half = torch.tensor([[0.5, 1.5, 127, -2.5]])
    assert activation_codes(half, activation_range(half, ActivationScheme()), ActivationScheme())[0].tolist() == [
        [0, 2, 127, -2]
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_activations(bits: int) -> None:
    scheme, levels = ActivationScheme(bits, asymmetric=True), 2**bits - 1
    x = torch.cat([random(5, 16), random(2, 16, seed=1).abs() + 1, -random(2, 16, seed=2).abs(), torch.zeros(1, 16)])
    codes, step = activation_codes(x, activation_range(x, scheme), scheme)
    values = activation_values(codes, step)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    size = (high - low).clamp(min=1e-5) / levels
    zero = (-low / size).round()
    expected = (((x / size).round() + zero).clamp(0, levels) - zero) * size
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert float(((values - x).abs() / size).max()) < 1.01 and not values[-1].any()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_token_that_is_not_finite_is_alone(asymmetric: bool) -> None:
    scheme = ActivationScheme(8, asymmetric)
    for odd in (float("nan"), float("inf"), -float("inf")):
        x = random(4, 8, dtype=torch.float32)
        x[2, 3] = odd
        extent = activation_range(x, scheme)
        assert not extent.isnan().any()  # a maximum over ranks may pass it over
        values = activation_values(*activation_codes(x, extent, scheme))
        assert values.isnan().all(-1).tolist() == [False, False, True, False]


def test_noise_is_uniform_and_goes_by_place_and_seed() -> None:
    place = torch.arange(1 << 16)
    noise = uniform(place, torch.tensor(0.02))
    assert -0.5 <= float(noise.min()) < -0.49 and 0.49 < float(noise.max()) < 0.5
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.var()) - 1 / 12) < 2e-3
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 2e-3
    other = uniform(place, torch.tensor(0.02).nextafter(torch.tensor(1.0)))
    assert abs(float((noise * other).mean())) < 2e-3
    assert torch.equal(uniform(place[5:9], torch.tensor(0.02)), noise[5:9])


def hashed(place: int, seed: float) -> float:
    """The same in whole numbers without limits."""
    [bits] = struct.unpack("<I", struct.pack("<f", seed))
    x = place ^ bits * 0x297A2D39 & 0xFFFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = (x ^ x >> 15) * factor & 0xFFFFFFFF
    return ((x ^ x >> 16) >> 8) / 2**24 - 0.5


def test_noise_is_the_hash_whatever_the_shapes() -> None:
    place = torch.tensor([0, 1, 77, 2**31 - 1, 2**31, 2**32 - 1, 123456789, 3000000000]).view(2, 4)
    for seeds in (torch.tensor(0.02), torch.tensor([[0.02], [3.0]]), torch.tensor([[[0.02]], [[1e-5]], [[7.0]]])):
        found = uniform(place, seeds)
        every = zip(place.expand(found.shape).flatten().tolist(), seeds.expand(found.shape).flatten(), strict=True)
        assert found.flatten().tolist() == [hashed(at, float(seed)) for at, seed in every]
        assert torch.equal(uniform(place.to(torch.int32), seeds), found)
    wide = torch.arange(3 * 50_000).view(3, 50_000)  # more than a part holds
    assert torch.equal(uniform(wide, torch.tensor(0.5)), uniform(wide.flatten(), torch.tensor(0.5)).view(3, -1))
    assert uniform(place[:0], torch.tensor([[1.0]])).shape == (0, 4)


def test_sums_of_large_matrices_are_those_of_their_parts() -> None:
    w = torch.randn(2, 300, 500, generator=torch.Generator().manual_seed(0))
    for kind in ("binary", "ternary"):
        for granularity, dims in (("tensor", (-2, -1)), ("channel", (-1,))):
            found = weight_statistics(w, WeightScheme(kind, granularity))
            torch.testing.assert_close(found.first, w.double().abs().sum(dims, keepdim=True), rtol=1e-14, atol=0)
            if kind == "binary":
                torch.testing.assert_close(found.second, w.double().sum(dims, keepdim=True), rtol=1e-11, atol=1e-9)
            assert found.number == (150_000 if granularity == "tensor" else 500)


def test_a_rotation_is_its_own_inverse_and_spreads_an_outlier() -> None:
    matrix = hadamard_matrix(8, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(8, dtype=torch.float64))
    x = random(3, 24)
    torch.testing.assert_close(rotate(rotate(x, 8), 8), x)
    assert float(rotate(torch.eye(8, dtype=torch.float64)[:1], 8).abs().max()) == pytest.approx(8**-0.5)


def test_unknown_quantizers_are_refused() -> None:
    with pytest.raises(ValueError, match="'int3' is not a quantizer of weights; there are binary"):
        WeightScheme("int3")
    with pytest.raises(ValueError, match="binary weights are symmetric"):
        WeightScheme("binary", asymmetric=True)
