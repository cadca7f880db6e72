"""The compiled pointwise operators for CPUs against their definitions in fp64, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megaforge.kernels import pointwise
from megaforge.kernels.native import why_missing
from megaforge.kernels.pointwise import native, reference

pytestmark = pytest.mark.skipif("cpu" not in native.COMPILED, reason=f"not built: {why_missing('pointwise', 'cpu')}")
MOST = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# Ours, its definition, how many vectors it has.
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "rms_norm": (
        lambda x, w: pointwise.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm_reference(x, w, 1e-5),
        1,
    ),
    "layer_norm": (
        lambda x, w, b: pointwise.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: reference.layer_norm_reference(x, w, b, 1e-5),
        2,
    ),
    "squared_relu": (pointwise.squared_relu, reference.squared_relu_reference, 0),
    "swiglu": (pointwise.swiglu, reference.swiglu_reference, 0),
    "gated_squared_relu": (pointwise.gated_squared_relu, reference.gated_squared_relu_reference, 0),
}
# The activation, what --activation's kernel of weighted rows is told, its definition.
WEIGHTED: dict[str, tuple[bool, bool, Callable[[Tensor], Tensor]]] = {
    "relu2": (True, False, reference.squared_relu_reference),
    "swiglu": (False, True, reference.swiglu_reference),
    "gated_relu2": (True, True, reference.gated_squared_relu_reference),
}


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    try:
        pointwise.squared_relu(torch.ones(1))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param


def given(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    x = (scale * torch.randn(shape, generator=generator)).to(dtype)
    return [x, *(torch.randn(shape[-1], generator=generator) for _ in range(OPERATORS[name][2]))]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(inputs[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.dtype))]


def check(name: str, inputs: list[Tensor]) -> None:
    ours, definition, _ = OPERATORS[name]
    dtype = inputs[0].dtype
    found, wanted = results(ours, inputs), results(definition, [x.double() for x in inputs])
    for place, (got, want, like) in enumerate(zip(found, wanted, (inputs[0], *inputs), strict=True)):
        assert got.dtype == like.dtype
        distance = float((got.double() - want).norm())
        # What should vanish does so up to rounding.
        assert distance <= MOST[dtype] * max(float(want.norm()), 1e-3 * want.numel() ** 0.5), f"{name}, result {place}"


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients(isa: str, name: str, dtype: torch.dtype) -> None:
    for shape in ((3, 2, 134), (1, 6), (90, 32)):
        check(name, given(name, shape, dtype))
    check(name, given(name, (4, 38), dtype, 1e4))
    check(name, given(name, (4, 38), dtype, 1e-4))
    inputs = given(name, (6, 10, 12), dtype)
    check(name, [inputs[0].transpose(0, 1), *inputs[1:]])  # not contiguous
    check(name, [inputs[0][:1, :1].expand(6, 10, 12).contiguous(), *inputs[1:]])  # rows alike
    check(name, [torch.zeros_like(inputs[0]), *inputs[1:]])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_is_its_own_affair(isa: str, name: str) -> None:
    """No row depends on the others, on how many there are or on the number of threads; NaN stays in its row; no rows
    give no gradient."""
    ours = OPERATORS[name][0]
    inputs = given(name, (700, 70), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(ours, inputs)
        torch.set_num_threads(3)
        three = results(ours, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert torch.equal(ours(inputs[0][3:5], *inputs[1:]), one[0][3:5])
    odd = inputs[0].clone()
    odd[7, 5] = float("nan")
    broken = ours(odd, *inputs[1:])
    assert broken[7].isnan().any() and torch.equal(
        torch.cat([broken[:7], broken[8:]]), torch.cat([one[0][:7], one[0][8:]])
    )
    none = results(ours, [inputs[0][:0], *inputs[1:]])
    assert none[0].shape[0] == 0 and all(not x.any() for x in none[2:])


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", WEIGHTED)
def test_rows_with_a_weight_each(isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    squared, gated, definition = WEIGHTED[name]
    generator = torch.Generator().manual_seed(5)
    for rows, width, scale in ((9, 134, 1.0), (1, 2, 1.0), (700, 38, 1.0), (5, 70, 1e3), (5, 70, 1e-3), (0, 6, 1.0)):
        x = (scale * torch.randn(rows, width, generator=generator)).to(dtype)
        weights = torch.rand(rows, generator=generator)
        weights[1:3] = 0  # dropped
        ours = lambda x, weights: pointwise.weighted_activation(x, weights, squared=squared, gated=gated)  # noqa: E731
        found = results(ours, [x, weights])
        wanted = results(lambda x, weights: definition(x) * weights[:, None], [x.double(), weights.double()])
        for got, want in zip(found, wanted, strict=True):
            assert float((got.double() - want).norm()) <= MOST[dtype] * float(want.norm())
        assert [one.dtype for one in found] == [dtype, dtype, torch.float32]
    narrow = results(ours, [x, weights.to(dtype)])
    assert narrow[2].dtype == dtype
    odd = torch.randn(4, 64, generator=generator).to(dtype)
    odd[2, 7] = float("nan")
    assert ours(odd, torch.ones(4)).isnan().any(1).tolist() == [False, False, True, False]
    calls: list[Tensor] = []
    monkeypatch.setattr(native, "_WEIGHTED", lambda x, *others: calls.append(x) or x[:, : x.shape[1] // (1 + gated)])
    ours(odd, torch.ones(4))
    assert len(calls) == 1


def test_gates_far_out(isa: str) -> None:
    far = torch.tensor([[-1e4, -100.0, -88.5, -87.0, 0.0, 88.0, 1e4, float("inf"), float("nan")]])
    out = pointwise.swiglu(torch.cat([far, torch.ones_like(far)], dim=1))
    torch.testing.assert_close(out, torch.nn.functional.silu(far), rtol=1e-6, atol=1e-36, equal_nan=True)
    assert pointwise.squared_relu(far).tolist()[0][:7] == [0.0, 0.0, 0.0, 0.0, 0.0, 7744.0, 1e8]
    assert pointwise.squared_relu(far).isnan().tolist()[0] == [False] * 8 + [True]


def test_operators_have_shapes_without_values() -> None:
    ops, x, weight = torch.ops.megaforge, torch.randn(3, 2, 6), torch.ones(6)
    _, _, mean, scale = ops.norm(x, None, weight, weight, 1e-5, True)
    for op, arguments in (
        (ops.norm, (x, x, weight, None, 1e-5, False)),
        (ops.norm, (x, None, weight, weight, 1e-5, True)),
        (ops.norm_backward, (x, x, x, weight, mean, scale, True)),
        (ops.squared_relu, (x,)),
        (ops.squared_relu_backward, (x, x)),
        (ops.gated, (x, native.SILU)),
        (ops.weighted, (x[:, 0], weight[:3], native.SQUARED_RELU, False)),
        (ops.weighted, (x[:, 0], weight[:3], native.SILU, True)),
        (ops.weighted_backward, (x[:, 0], x[:, 0], weight[:3], native.SQUARED_RELU, False)),
        (ops.gated_backward, (x[..., :3], x, native.SQUARED_RELU)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_is_not_taken_is_plain_torch() -> None:
    half = torch.randn(4, 8).half()
    assert not native.takes(half) and not native.takes(torch.zeros(3, 0)) and not native.takes(torch.tensor(1.0))
    assert not native.takes(torch.ones(4, 8), torch.ones(8).double())
    assert native.takes(torch.ones(4, 8), torch.ones(8), None)
    torch.testing.assert_close(pointwise.swiglu(half), reference.swiglu_reference(half))
