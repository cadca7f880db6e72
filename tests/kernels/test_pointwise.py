"""Pointwise operators against their definitions in fp64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaforge.kernels import pointwise
from megaforge.kernels.pointwise import reference
from tests.nn.support import assert_close, random

ANGLES = random(5, 2, 1, 3, seed=7)
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (
        lambda x, w: pointwise.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm_reference(x, w, 1e-5),
        [(5, 2, 8), (8,)],
    ),
    "layer_norm": (
        lambda x, w, b: pointwise.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: reference.layer_norm_reference(x, w, b, 1e-5),
        [(5, 2, 8), (8,), (8,)],
    ),
    "squared_relu": (pointwise.squared_relu, reference.squared_relu_reference, [(5, 2, 8)]),
    "swiglu": (pointwise.swiglu, reference.swiglu_reference, [(5, 2, 8)]),
    "gated_squared_relu": (
        pointwise.gated_squared_relu,
        reference.gated_squared_relu_reference,
        [(5, 2, 8)],
    ),
    "rotary": (
        lambda x: pointwise.apply_rotary(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),
        lambda x: reference.apply_rotary_reference(x, ANGLES.cos(), ANGLES.sin()),
        [(5, 2, 4, 8)],
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.0, 30.0], ids=["random", "all zero", "large"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients(name: str, dtype: torch.dtype, tolerance: float, scale: float) -> None:
    function, definition, shapes = OPERATORS[name]
    inputs = [(scale if index == 0 else 1.0) * random(*shape, seed=index) for index, shape in enumerate(shapes)]
    ours, theirs = ([x.to(t).requires_grad_() for x in inputs] for t in (dtype, torch.float64))
    out, expected = function(*ours), definition(*theirs)
    assert out.dtype == dtype
    grad = random(*out.shape, seed=9)
    found = torch.autograd.grad(out, ours, grad.to(dtype))
    wanted = torch.autograd.grad(expected, theirs, grad)
    for place, (a, b) in enumerate(zip((out, *found), (expected, *wanted), strict=True)):
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()), msg=f"{name}, result {place}"
        )


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms_of_a_stream(name: str, dtype: torch.dtype, adds: bool) -> None:
    """The sum and its norm are those of an addition in front of the norm, to the bit, and so are gradients up to their
    rounding; whichever of the two is used."""
    function = getattr(pointwise, f"stream_{name}")
    _, definition, shapes = OPERATORS[name]
    vectors = [random(*shape, seed=index + 2).to(torch.promote_types(dtype, torch.float32)) for index, shape in
               enumerate(shapes[1:])]  # fmt: skip
    x, update, grad, grad_stream = (random(70, 2, 8, seed=seed).to(dtype) for seed in (0, 1, 8, 9))
    update_of = {"update": update.clone().requires_grad_()} if adds else {}
    leaves = {"x": x.clone().requires_grad_(), **update_of, "vectors": [v.clone().requires_grad_() for v in vectors]}
    trained = [leaves["x"], *update_of.values(), *leaves["vectors"]]
    out, stream = function(leaves["x"], update_of.get("update"), *leaves["vectors"], 1e-5)
    total = x + update if adds else x
    assert torch.equal(stream, total) and torch.equal(out, getattr(pointwise, name)(total, *vectors, 1e-5))
    wide = [leaf.detach().double().requires_grad_() for leaf in trained]
    split = 2 if adds else 1
    wide_stream = sum(wide[1:split], wide[0])
    wide_out = definition(wide_stream, *wide[split:])
    most = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    for used in ((0, 1), (0,), (1,)):
        given = [(out, grad), (stream, grad_stream)]
        wanted = [(wide_out, grad.double()), (wide_stream, grad_stream.double())]
        found, expected = (
            torch.autograd.grad(
                [of[i][0] for i in used], inputs, [of[i][1] for i in used], retain_graph=True, allow_unused=True
            )
            for of, inputs in ((given, trained), (wanted, wide))
        )
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            if b is None:
                assert a is None or not a.any()
            else:
                assert float((a.double() - b).norm()) <= most * float(b.norm()), f"result {place} by {used}"


def test_rows_of_one_token_turn_by_their_own_angles() -> None:
    x = random(1, 2, 4, 8).expand(5, 2, 4, 8)
    out = pointwise.apply_rotary(x, ANGLES.cos(), ANGLES.sin())
    assert_close(out, reference.apply_rotary_reference(x, ANGLES.cos(), ANGLES.sin()), 1e-14, "rotated")
    assert torch.equal(out[..., 6:], x[..., 6:]) and not torch.equal(out[0], out[1])
