"""Quantized products and their gradients against autograd through ``x + (q(x) - x).detach()`` in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaforge.kernels.bitgemm import bit_linear, pack, prepare
from megaforge.kernels.grouped_mm import make_runs
from megaforge.parallel.linear_op import PLAIN
from megaforge.quant import linear
from megaforge.quant.linear import ROWS_TO_PACK, QuantizedLinear
from megaforge.quant.packed import PackedLinear
from megaforge.quant.products import multiplies_packed
from megaforge.quant.quantizers import (
    ActivationScheme,
    Scale,
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
from megaforge.quant.rotation import rotate
from megaforge.quant.scales import WholeMatrix

WEIGHTS = {
    "binary": WeightScheme("binary"),
    "ternary": WeightScheme("ternary"),
    "ternary, rows": WeightScheme("ternary", "channel"),
    "binary, groups": WeightScheme("binary", "group", 4),
    "int4": WeightScheme("int4"),
    "int8, asymmetric": WeightScheme("int8", asymmetric=True),
    "int4, asymmetric groups": WeightScheme("int4", "group", 8, asymmetric=True),
    "none": None,
}
ACTIVATIONS = {
    "int8": ActivationScheme(),
    "int4, asymmetric": ActivationScheme(4, asymmetric=True),
    "none": None,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def op_of(
    weights: WeightScheme | None, activations: ActivationScheme | None, noise: float = 0.0, rotation: int = 0
) -> QuantizedLinear:
    source = None if weights is None else WholeMatrix(weights)
    layer = nn.Module()
    return QuantizedLinear(weights, activations, source, layer=layer, noise=noise, rotation=rotation)


def seen_weights(w: Tensor, scheme: WeightScheme | None, share: float) -> Tensor:
    if scheme is None:
        return w
    scale = weight_scale(weight_statistics(w.detach(), scheme), scheme, w.dtype)
    return w + share * (weight_values(weight_codes(w.detach(), scale, scheme), scale, scheme) - w).detach()


def seen_activations(x: Tensor, scheme: ActivationScheme | None, share: float) -> Tensor:
    if scheme is None:
        return x
    codes, step = activation_codes(x.detach(), activation_range(x.detach(), scheme), scheme)
    return x + share * (activation_values(codes, step) - x).detach()


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("rotation", [0, 4])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_go_straight_through(weights: str, activations: str, rotation: int, share: float) -> None:
    of_w, of_x = WEIGHTS[weights], ACTIVATIONS[activations]
    x, w, bias = random(3, 2, 16), random(5, 16, seed=1), random(5, seed=2)
    direction = random(3, 2, 5, seed=3)
    expected = [t.clone().requires_grad_() for t in (x, w, bias)]
    turned = rotate(expected[0], rotation) if rotation else expected[0]
    out = seen_activations(turned, of_x, share) @ seen_weights(expected[1], of_w, share).t() + expected[2]
    out.backward(direction)
    ours = [t.clone().requires_grad_() for t in (x, w, bias)]
    op = op_of(of_w, of_x, rotation=rotation)
    op.share = share
    found = op.apply(*ours)
    found.backward(direction)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)
    # What quantizes is not the plain product, and moves something.
    plain = PLAIN.forward((turned.detach(),), w, bias)
    assert (of_w is None and of_x is None) == torch.allclose(found.detach(), plain, rtol=1e-9)


@pytest.mark.parametrize("weights", ["binary", "ternary, rows", "int8, asymmetric", "binary, groups"])
def test_experts_have_steps_of_their_own(weights: str) -> None:
    scheme, of_x = WEIGHTS[weights], ActivationScheme()
    assert scheme is not None
    counts = (3, 0, 4)
    x, w = random(7, 16), random(3, 5, 16, seed=1) * torch.tensor([1.0, 2, 30]).view(3, 1, 1)
    expected = [t.clone().requires_grad_() for t in (x, w)]
    rows = seen_activations(expected[0], of_x, 1.0).split(counts)
    out = torch.cat([part @ seen_weights(one, scheme, 1.0).t() for part, one in zip(rows, expected[1], strict=True)])
    out.square().sum().backward()
    ours = [t.clone().requires_grad_() for t in (x, w)]
    found = op_of(scheme, of_x).apply(*ours, runs=make_runs(counts, x.device))
    found.square().sum().backward()
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)
    narrow = op_of(scheme, of_x).apply(x.float(), w.float(), runs=make_runs(counts, x.device))
    torch.testing.assert_close(narrow.double(), out.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["binary", "ternary", "int4"])
def test_the_product_is_that_of_the_packed_kernel_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    for tokens, width in ((1, 33), (5, 300)):
        x, w, bias = random(tokens, width, dtype=dtype), random(7, width, seed=1, dtype=dtype), random(7, dtype=dtype)
        codes, step = quantize_weight(w, kind)
        packed = prepare(pack(codes, step, kind))
        assert torch.equal(op_of(WeightScheme(kind), ActivationScheme()).apply(x, w, bias), bit_linear(x, packed, bias))


def test_sums_beyond_what_the_type_holds_do_not_overflow() -> None:
    x, w = torch.full((2, 4096), 3.0), torch.full((3, 4096), 0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = op_of(WEIGHTS["ternary"], ActivationScheme()).apply(x.to(dtype), w.to(dtype))
        assert torch.equal(found, torch.full((2, 3), 6144.0, dtype=dtype))


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    x, w = random(4, 8, dtype=torch.float32), random(3, 8, dtype=torch.float32)
    x[1, 2] = float("inf")
    for weights in WEIGHTS.values():
        found = op_of(weights, ActivationScheme()).apply(x, w)
        assert found.isnan().all(-1).tolist() == [False, True, False, False]


def test_no_tokens_and_no_rows_of_an_expert() -> None:
    op = op_of(WEIGHTS["ternary"], ActivationScheme())
    w = random(2, 3, 8, dtype=torch.float32).requires_grad_()
    x = torch.zeros(0, 8, requires_grad=True)
    out = op.apply(x, w, runs=make_runs((0, 0), x.device))
    out.sum().backward()
    assert out.shape == (0, 3) and w.grad is not None and not w.grad.any()


def test_noise_moves_codes_in_training_alone_and_stays_within_a_step() -> None:
    w = random(32, 64, dtype=torch.float32)
    x = torch.eye(64)
    for kind in ("binary", "ternary", "int4"):
        op, quiet = op_of(WeightScheme(kind), None, noise=0.5), op_of(WeightScheme(kind), None)
        seen, plain = op.apply(x, w), quiet.apply(x, w)
        assert torch.equal(op.apply(x, w), seen)  # the same product again, as recomputation wants it
        moved = (seen != plain).double().mean()
        assert 0.01 < float(moved) < 0.5
        op.layer.eval()
        assert torch.equal(op.apply(x, w), plain)
        op.layer.train()
        assert torch.equal(op.quantize(w).values, quiet.quantize(w).values)
        op.forget()
        assert not torch.equal(op.apply(x, w * 1.001), seen * 1.001)  # another step has other noise


def test_codes_are_made_once_between_two_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all micro-batches, recomputation and gradients; evaluation is without noise."""
    made: list[bool] = []

    def counted(*given: Any) -> Tensor:
        made.append(given[3] is not None)
        return weight_codes(*given)

    monkeypatch.setattr(linear, "weight_codes", counted)
    op, w = op_of(WeightScheme("ternary"), ActivationScheme(), noise=0.2), random(6, 8).requires_grad_()
    for _ in range(2):
        for _ in range(3):
            op.apply(random(5, 8).requires_grad_(), w).sum().backward()
        op.forget()
    assert made == [True, True]
    op.apply(random(5, 8), w)
    op.layer.eval()
    op.apply(random(5, 8), w)
    op.set_weights(WeightScheme("int4"))
    op.apply(random(5, 8), w)
    assert made[2:] == [True, False, False]


@pytest.mark.skipif(not multiplies_packed(torch.device("cpu")), reason="no compiled packed kernels for this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_binary_matrices_of_many_tokens_are_multiplied_packed_with_the_same_bits(dtype: torch.dtype) -> None:
    x, w, bias = random(ROWS_TO_PACK, 24, dtype=dtype), random(40, 24, seed=1, dtype=dtype), random(40, dtype=dtype)
    for granularity in ("tensor", "channel"):
        op = op_of(WeightScheme("binary", granularity), ActivationScheme(), noise=0.3)
        inside = op.encode(x, None)
        op.forget()
        expected, sums = op.forward(inside, w, bias), op.sums(inside, w)
        assert op._known is not None and op._known.packed is None
        op.forget()
        assert torch.equal(op.forward(inside, w, bias), expected)
        assert torch.equal(op.sums(inside, w), sums)
        assert op._known is not None and op._known.packed is not None
        op.forget()
        op.forget()  # as an optimizer's step does, and what follows it
        op.forward(inside, w, bias)
        assert op._known is not None and op._known.packed is not None
        op.forget()
        op.forward(op.encode(x[:3], None), w)
        op.forget()
        op.forward(inside, w, bias)
        assert op._known is not None and op._known.packed is None  # after an interval of few tokens


def test_codes_of_a_range_need_no_other_weights() -> None:
    for kind in ("binary", "ternary", "int4"):
        for shape in ((6, 8), (3, 5, 8)):
            op, w = op_of(WeightScheme(kind), ActivationScheme()), random(*shape)
            expected, scale = op.codes(w)
            for start, stop in ((0, 0), (0, w.numel()), (3, 5), (7, 33), (w.numel() - 1, w.numel())):
                own = torch.full_like(w, torch.nan)
                own.view(-1)[start:stop] = w.view(-1)[start:stop]
                assert torch.equal(op.codes_within(own, start, stop), expected.view(-1)[start:stop])


def test_codes_that_arrive_stand_for_the_weights() -> None:
    op, w, x = op_of(WEIGHTS["ternary"], ActivationScheme()), random(6, 8), random(4, 8)
    assert op.code_kind == "ternary" and op_of(WEIGHTS["ternary"], None, noise=0.1).code_kind is None
    expected, seen = op.apply(x, w), op.quantize(w).values
    nothing = torch.full_like(w, torch.nan)
    op.take_codes(op.codes(w)[0])
    assert torch.equal(op.apply(x, nothing), expected) and torch.equal(op.quantize(nothing).values, seen)
    assert torch.equal(
        op.input_gradient(random(4, 6), nothing), op_of(WEIGHTS["ternary"], None).input_gradient(random(4, 6), w)
    )
    op.forget()
    with pytest.raises(RuntimeError, match="before they had arrived"):
        op.apply(x, w)


def test_a_scale_holds_until_it_is_forgotten() -> None:
    op, w = op_of(WEIGHTS["ternary"], None), random(4, 8)
    before = op.quantize(w).values
    torch.testing.assert_close(op.quantize(10 * w).largest, op.quantize(w).largest)
    op.forget()
    torch.testing.assert_close(op.quantize(10 * w).values, 10 * before)


@pytest.mark.parametrize("weights", [name for name, scheme in WEIGHTS.items() if scheme is not None])
def test_the_largest_magnitude_is_what_a_weight_can_have(weights: str) -> None:
    scheme = WEIGHTS[weights]
    assert scheme is not None
    w = random(8, 16) + 0.2
    values, largest = op_of(scheme, None).quantize(w)
    assert bool((values.abs() <= largest * (1 + 1e-12)).all())
    assert float((values.abs() / largest).max()) > 0.9


def test_a_source_and_a_scheme_belong_together() -> None:
    with pytest.raises(ValueError, match="source of their steps"):
        QuantizedLinear(WeightScheme("binary"), None, None, layer=nn.Module())
    assert replace(WeightScheme("int4"), asymmetric=True).bits == 4


def test_what_are_no_codes_is_not_packed() -> None:
    op, scale = op_of(WEIGHTS["ternary"], None), Scale(torch.ones(1, 1))
    for codes in (torch.zeros(4, 8), torch.zeros(8, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"codes are int8 \[\(E,\) N, K\]"):
            PackedLinear(op, codes, scale, dtype=torch.float32, kernels=False)
