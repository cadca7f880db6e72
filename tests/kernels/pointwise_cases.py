"""The Triton kernels of norms, activations and rotations against their definitions in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megaforge.kernels.native import triton_kernels
from megaforge.kernels.pointwise import reference, triton
from tests.kernels.triton_support import BF16, DEVICE, compare

FP32 = (torch.float32, 2e-6)


@pytest.fixture(autouse=True)
def with_kernels() -> None:
    assert triton_kernels("pointwise")[0] is not None


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def compare_norms(x: torch.Tensor, dtype: torch.dtype, tolerance: float) -> None:
    weight, bias = torch.randn(x.shape[-1]), torch.randn(x.shape[-1])
    compare(
        lambda x, w: triton.Norm.apply(x, w, None, 1e-5, False),
        lambda x, w: reference.rms_norm_reference(x, w, 1e-5),
        [x, weight], dtype, tolerance,
    )  # fmt: skip
    compare(lambda x, w, b: triton.Norm.apply(x, w, b, 1e-5, True), layer_norm, [x, weight, bias], dtype, tolerance)


# Rows that share a tile, odd widths, more rows than a program has, one row, rows of one channel.
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [((5, 3, 64), *FP32), ((70, 2, 2050), *FP32), ((1, 7), *FP32), ((0, 2, 8), *FP32), ((20, 2, 100), *BF16)],
)
def test_norms(shape, dtype, tolerance) -> None:
    torch.manual_seed(1)
    compare_norms(torch.randn(shape).to(dtype), dtype, tolerance)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [((5, 3, 64), *FP32), ((70, 2, 2050), *FP32), ((1, 7), *FP32), ((0, 2, 8), *FP32), ((20, 2, 100), *BF16)],
)
def test_norms_of_a_stream(shape, dtype, tolerance, adds) -> None:
    """The sum comes back, and its gradient is added."""
    torch.manual_seed(7)
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1])
    update = torch.randn(shape).to(dtype) if adds else None

    def total(x, update):
        return x if update is None else x + update

    compare(
        lambda x, u, w: triton.StreamNorm.apply(x, u, w, None, 1e-5, False),
        lambda x, u, w: (reference.rms_norm_reference(total(x, u), w, 1e-5), total(x, u)),
        [x, update, weight], dtype, tolerance,
    )  # fmt: skip
    compare(
        lambda x, u, w, b: triton.StreamNorm.apply(x, u, w, b, 1e-5, True),
        lambda x, u, w, b: (layer_norm(total(x, u), w, b), total(x, u)),
        [x, update, weight, bias], dtype, tolerance,
    )  # fmt: skip


@pytest.mark.parametrize(
    "cut", [(slice(None), slice(None), slice(1, 3)), (slice(None), slice(0, 1)), (slice(0, 9, 2),)]
)
def test_norms_of_heads_of_a_wider_tensor(cut) -> None:
    """Which are read where they lie, or copied first."""
    torch.manual_seed(6)
    x = torch.randn(9, 2, 4, 16)
    groups = [triton._groups_of_rows(y)[0] for y in (x, x[cut])]
    assert groups[0].data_ptr() == x.data_ptr() and groups[1].is_contiguous() == (len(cut) != 3)
    compare(
        lambda x, w: triton.Norm.apply(x[cut], w, None, 1e-5, False),
        lambda x, w: reference.rms_norm_reference(x[cut], w, 1e-5),
        [x, torch.randn(16)], *FP32,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e8])
def test_norms_of_one_token(scale: float) -> None:
    """Alike rows: of zeros, far below epsilon, large."""
    torch.manual_seed(2)
    compare_norms(scale * torch.randn(1, 1, 40).expand(30, 2, 40), torch.float32, 1e-5)


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 8, device=DEVICE)
    x[1, 2] = float("nan")
    for centered in (False, True):
        out = triton.Norm.apply(x, torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE), 1e-5, centered)
        assert out[1].isnan().all() and int(out.isnan().sum()) == 8
    assert int(triton.SquaredReLU.apply(x).isnan().sum()) == 1
    assert int(triton.Gated.apply(x, True).isnan().sum()) == 1


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e3])
@pytest.mark.parametrize(("shape", "dtype", "tolerance"), [((9, 2, 520), *FP32), ((1, 2), *FP32), ((7, 2, 66), *BF16)])
def test_activations(shape, dtype, tolerance, scale) -> None:
    torch.manual_seed(3)
    x = scale * torch.randn(shape).to(dtype)
    compare(triton.SquaredReLU.apply, reference.squared_relu_reference, [x], dtype, tolerance)
    compare(lambda x: triton.Gated.apply(x, False), reference.swiglu_reference, [x], dtype, tolerance)
    compare(lambda x: triton.Gated.apply(x, True), gated_squared_relu, [x], dtype, tolerance)


def gated_squared_relu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate.relu().square() * up


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "tolerance"), [(9, 520, *FP32), (1, 1, *FP32), (0, 8, *FP32), (7, 33, *BF16)]
)
@pytest.mark.parametrize("kind", ["relu2", "gated_relu2", "swiglu"])
def test_weighted_activations(kind, rows, width, dtype, tolerance) -> None:
    torch.manual_seed(5)
    squared, gated = kind != "swiglu", kind != "relu2"
    x, weights = torch.randn(rows, width * (1 + gated)).to(dtype), torch.randn(rows)
    weights[1:3] = 0
    gate = gated_squared_relu if squared else reference.swiglu_reference
    definition = gate if gated else reference.squared_relu_reference
    compare(
        lambda x, w: triton.Weighted.apply(x, w, squared, gated),
        lambda x, w: definition(x) * w.unsqueeze(1),
        [x, weights], dtype, tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("s", "b", "heads", "width", "half", "dtype", "tolerance"),
    [(5, 2, 3, 16, 8, *FP32), (1, 1, 1, 7, 2, *FP32), (40, 3, 2, 64, 12, *FP32), (9, 2, 3, 32, 16, *BF16)],
)
def test_rotations(s, b, heads, width, half, dtype, tolerance, strided) -> None:
    """Also of heads that are part of a wider tensor, as queries and keys are, and of strided angles."""
    torch.manual_seed(4)
    angles = torch.randn(b, s, 1, half, device=DEVICE).transpose(0, 1) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = torch.randn(s, b, (heads + 1) * width).to(dtype)

    def view(x: torch.Tensor) -> torch.Tensor:
        part = x[..., : heads * width].unflatten(-1, (heads, width))
        return part if strided else part.contiguous()

    compare(
        lambda x: triton.Rotate.apply(view(x), cos, sin),
        lambda x: reference.apply_rotary_reference(view(x), cos.double(), sin.double()),
        [x], dtype, tolerance,
    )  # fmt: skip
