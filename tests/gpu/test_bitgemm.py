"""Products with packed weights on a GPU, every form of them, against the definition on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.bitgemm import BITS, Packed, bit_linear, bit_product, pack, prepare, reference
from megaforge.kernels.bitgemm.cuda import COMPILED, FORMS, has_wgmma, linear_by, panel_shape
from tests.kernels.test_bitgemm import some_codes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiled = pytest.mark.skipif("cuda" not in COMPILED, reason="megaforge.kernels._bitgemm_cuda is not built")
SCHEMES = pytest.mark.parametrize("scheme", ["binary", "ternary", "int4"])
GPU = torch.device("cuda")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    if request.param == "wgmma" and not has_wgmma(torch.device("cuda", 0)):
        pytest.skip("no wgmma: another GPU than sm_90, or a build without 9.0a")
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_of(scheme: str, rows: int, columns: int, groups: int = 0) -> Packed:
    shape = (rows, groups) if groups else (rows,)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(rows)) + 0.1
    return pack(some_codes(scheme, rows, columns), scale, scheme)


def moved(packed: Packed) -> Packed:
    return Packed(packed.codes.to(GPU), packed.scheme, packed.shape, packed.scale.to(GPU))


def by(form: str, x: Tensor, packed: Packed, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    weight = prepare(moved(packed))
    there = None if bias is None else bias.to(GPU)
    bits = BITS[packed.scheme]
    return linear_by(form, x.to(GPU), weight.panels, weight.scale, there, packed.shape, bits, activation_bits).cpu()


def defined(x: Tensor, packed: Packed, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    codes = reference.unpack_codes(packed.codes, packed.scheme, packed.shape[1])
    quantized = reference.quantize_activations(x, activation_bits)
    return reference.product(*quantized, codes, packed.scale, bias, x.dtype)


@compiled
@SCHEMES
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (2, 16, 64), (3, 17, 130), (8, 300, 4096), (33, 257, 1000), (130, 140, 520), (300, 900, 2048)],
    ids=str,
)  # fmt: skip
def test_every_form_is_the_definition(form: str, scheme: str, sizes: tuple[int, int, int]) -> None:
    tokens, rows, columns = sizes
    packed, bias = packed_of(scheme, rows, columns), random(rows, seed=1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random(tokens, columns).to(dtype)
        assert torch.equal(by(form, x, packed), defined(x, packed))
        assert torch.equal(by(form, x, packed, bias, 4), defined(x, packed, bias, 4))


@compiled
@SCHEMES
def test_the_chosen_form_at_every_count_of_tokens(scheme: str) -> None:
    packed = packed_of(scheme, 272, 640)
    weight = prepare(moved(packed))
    for tokens in (1, 2, 3, 4, 5, 8, 9, 32, 33, 64, 65, 128, 129, 257):
        x = random(tokens, 640, seed=tokens).bfloat16()
        assert torch.equal(bit_linear(x.to(GPU), weight).cpu(), defined(x, packed)), tokens


@compiled
@SCHEMES
@pytest.mark.parametrize("size", [32, 64, 96, 128, 7])
@pytest.mark.parametrize("tokens", [1, 70])
def test_scales_of_groups(scheme: str, size: int, tokens: int) -> None:
    packed = packed_of(scheme, 150, 5 * size, groups=5)
    x, bias = random(tokens, 5 * size), random(150, seed=1)
    got = bit_linear(x.to(GPU), prepare(moved(packed)), bias.to(GPU)).cpu()
    assert torch.equal(got, defined(x, packed, bias)) and torch.equal(by("plain", x, packed, bias), got)


@compiled
@SCHEMES
def test_tokens_that_are_codes_already(scheme: str) -> None:
    packed = packed_of(scheme, 100, 333)
    codes, worth = reference.quantize_activations(random(70, 333))
    weight, plain = prepare(moved(packed)), prepare(packed)
    for tokens in (1, 70):
        got = bit_product(codes[:tokens].to(GPU), worth[:tokens].to(GPU), weight, dtype=torch.bfloat16)
        assert torch.equal(got.cpu(), bit_product(codes[:tokens], worth[:tokens], plain, dtype=torch.bfloat16))


@compiled
@SCHEMES
def test_extremes_and_broken_tokens(form: str, scheme: str) -> None:
    rows, columns = 48, 16384
    most = {"binary": 1, "ternary": 1, "int4": -8}[scheme]
    packed = pack(torch.full((rows, columns), most, dtype=torch.int8), torch.tensor(1.0), scheme)
    x = torch.ones(6, columns)
    x[1], x[2, 7], x[3, 9], x[5] = 0, torch.nan, torch.inf, 3e38
    x[4] = -1
    got, expected = by(form, x, packed), defined(x, packed)
    assert torch.equal(got[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
    assert got[2:4].isnan().all() and not got[1].any()


@compiled
def test_views_and_empty_ones() -> None:
    packed = packed_of("ternary", 64, 136)
    weight, x = prepare(moved(packed)), random(6, 273)
    view = x.to(GPU)[::2, 1:137]
    assert torch.equal(bit_linear(view, weight).cpu(), defined(x[::2, 1:137].contiguous(), packed))
    flat = x.to(GPU).flatten()[1:].narrow(0, 0, 136).view(1, 136)  # no multiple of 16 bytes
    assert torch.equal(bit_linear(flat, weight).cpu(), defined(flat.cpu(), packed))
    assert bit_linear(x.to(GPU)[:0, :136], weight).shape == (0, 64)
    assert prepare(moved(packed)).panels.shape == panel_shape(64, 2, 136)


@compiled
def test_it_is_captured_in_a_graph() -> None:
    packed = packed_of("ternary", 256, 512)
    weight = prepare(moved(packed))
    x = torch.zeros(1, 512, device=GPU)
    bit_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bit_linear(x, weight)
    given = random(1, 512)
    x.copy_(given)
    graph.replay()
    assert torch.equal(y.cpu(), defined(given, packed))


@compiled
def test_the_operators_keep_torchs_rules() -> None:
    packed = moved(packed_of("ternary", 64, 72))
    weight, x = prepare(packed), torch.randn(3, 72, device=GPU)
    codes, worth = reference.quantize_activations(x)
    ops, rest = torch.ops.megaforge, (weight.scale, None, 64, 2, 72)
    torch.library.opcheck(ops.bitgemm_prepare.default, (packed.codes, 2, 72, 1))
    torch.library.opcheck(ops.bitgemm_linear.default, (x, weight.panels, *rest, 8))
    torch.library.opcheck(ops.bitgemm_product.default, (codes, worth, weight.panels, *rest, torch.float32))


@compiled
def test_what_does_not_fit_is_refused() -> None:
    packed = moved(packed_of("ternary", 64, 128))
    weight, x = prepare(packed), torch.randn(3, 128, device=GPU)
    with pytest.raises(RuntimeError, match="not what bitgemm_prepare makes"):
        torch.ops.megaforge.bitgemm_linear(x, packed.codes, weight.scale, None, 64, 2, 128, 8)
    grouped = torch.ones(64, 4, device=GPU)
    with pytest.raises(RuntimeError, match="no form 'gemv'"):
        linear_by("gemv", x, weight.panels, grouped, None, (64, 128), 2)
