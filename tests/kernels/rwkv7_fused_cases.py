"""RWKV-7's fused arithmetic against its definition in torch."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels import rwkv7_fused
from megaforge.kernels.native import triton_kernels
from tests.kernels.triton_support import BF16, DEVICE, compare


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device."""
    assert triton_kernels("rwkv7_fused")[0] is not None
    monkeypatch.setattr(rwkv7_fused, "fused", lambda x: True)


@pytest.mark.parametrize(
    ("s", "batch", "width", "count", "boundaries", "chunks", "dtype", "tolerance"),
    [
        (1, 2, 5, 6, True, 1, torch.float32, 2e-6),
        (1, 2, 5, 6, False, 0, torch.float32, 2e-6),
        (50, 3, 130, 6, True, 1, torch.float32, 2e-6),
        (50, 3, 130, 2, True, 2, torch.float32, 2e-6),
        (10, 3, 130, 2, False, 1, torch.float32, 2e-6),
        (2, 3, 5, 1, False, 2, torch.float32, 2e-6),
        (70, 2, 64, 1, True, 0, torch.float32, 2e-6),
        (20, 2, 40, 3, True, 1, *BF16),
    ],
)
def test_shifted_mixes(s, batch, width, count, boundaries, chunks, dtype, tolerance) -> None:
    """``chunks``: as ranks of cp hold them; 0: nothing before the first token."""
    torch.manual_seed(s)
    starts = torch.rand(s, batch) < 0.2 if boundaries else None
    before = torch.randn(chunks, batch, width).to(dtype) if chunks else None
    coefficients = [torch.rand(width).to(dtype).float() for _ in range(count)]
    inputs = [torch.randn(s, batch, width).to(dtype), before, starts, *coefficients]
    compare(
        lambda x, f, m, *c: rwkv7_fused.shifted_mixes(x, f, m, c),
        lambda x, f, m, *c: rwkv7_fused.shifted_mixes_reference(x, f, m, c),
        inputs, dtype, tolerance,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("s", "batch", "heads", "n", "dtype", "tolerance"),
    [
        (1, 1, 1, 16, torch.float32, 3e-6),
        (37, 2, 3, 32, torch.float32, 3e-6),
        (70, 2, 1, 64, torch.float32, 3e-6),
        (20, 1, 2, 32, *BF16),
    ],
)
def test_norm_bonus_gate(s, batch, heads, n, dtype, tolerance) -> None:
    torch.manual_seed(s)
    inputs = [torch.randn(s, batch, heads, n).to(dtype) for _ in range(4)]
    inputs.append(torch.randn(s, batch, heads * n).to(dtype))
    inputs += [torch.randn(heads * n), torch.randn(heads * n), torch.randn(heads, n)]
    epsilon = 64e-5
    compare(
        lambda *x: rwkv7_fused.norm_bonus_gate(*x, epsilon),
        lambda *x: rwkv7_fused.norm_bonus_gate_reference(*x, epsilon),
        inputs, dtype, tolerance,
    )  # fmt: skip


def test_shifted_mixes_of_one_token() -> None:
    """Every token alike: what is mixed in is zero but at document starts."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, 40).expand(30, 2, 40).clone()
    starts = torch.zeros(30, 2, dtype=torch.bool)
    starts[[7, 8], 1] = True
    compare(
        lambda x, f, m, *c: rwkv7_fused.shifted_mixes(x, f, m, c),
        lambda x, f, m, *c: rwkv7_fused.shifted_mixes_reference(x, f, m, c),
        [x, x[:1].clone(), starts, *(torch.rand(40) for _ in range(6))], torch.float32, 4e-6,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_norm_bonus_gate_of_one_token(scale: float) -> None:
    """Alike rows, whose outputs are nothing, far below the norm's epsilon, or large."""
    torch.manual_seed(2)
    y, r, k, v = (torch.randn(1, 2, 2, 32).expand(20, 2, 2, 32).clone() for _ in range(4))
    gate = torch.randn(1, 2, 64).expand(20, 2, 64).clone()
    inputs = [scale * y, r, k, v, gate, torch.randn(64), torch.randn(64), torch.randn(2, 32)]
    compare(
        lambda *x: rwkv7_fused.norm_bonus_gate(*x, 64e-5),
        lambda *x: rwkv7_fused.norm_bonus_gate_reference(*x, 64e-5),
        inputs, torch.float32, 1e-5,
    )  # fmt: skip


def inputs_of_wkv7(s: int, batch: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    tokens = [torch.randn(s, batch, width).to(dtype) for _ in range(3)]
    vectors = [torch.randn(width) for _ in range(4)]
    return [tokens[0], vectors[0], tokens[1], vectors[1], tokens[2], *vectors[2:]]


def compare_inputs(inputs: list[torch.Tensor], n: int, dtype: torch.dtype, tolerance: float) -> None:
    compare(
        lambda *x: rwkv7_fused.rwkv7_inputs(*x, n),
        lambda *x: rwkv7_fused.rwkv7_inputs_reference(*x, n),
        inputs, dtype, tolerance,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("s", "batch", "heads", "n", "dtype", "tolerance"),
    [
        (1, 1, 1, 16, torch.float32, 3e-6),
        (37, 2, 3, 32, torch.float32, 3e-6),
        (70, 2, 1, 64, torch.float32, 3e-6),
        (20, 1, 2, 32, *BF16),
    ],
)
def test_inputs(s, batch, heads, n, dtype, tolerance) -> None:
    torch.manual_seed(s)
    compare_inputs(inputs_of_wkv7(s, batch, heads * n, dtype), n, dtype, tolerance)


@pytest.mark.parametrize("saturation", [-60.0, 60.0])
def test_inputs_of_one_token(saturation: float) -> None:
    """Alike rows, sigmoids at 0 and 1, heads of keys that are zero, large and small."""
    torch.manual_seed(4)
    inputs = [
        x[:1].expand(20, 2, 128).clone() if x.dim() == 3 else x for x in inputs_of_wkv7(20, 2, 128, torch.float32)
    ]
    inputs[1].fill_(saturation)
    inputs[3].fill_(-saturation)
    inputs[4][..., :32] = 0
    inputs[4][..., 32:64] *= 1e8
    inputs[4][..., 64:96] *= 1e-6
    got, expected = ([x.cpu() for x in of] for of in both_ways(inputs, 32))
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for head in range(4):
            here = slice(32 * head, 32 * head + 32)
            a, b = (x.flatten(-2)[..., here] if x.dim() == 4 else x[..., here] for x in (ours, theirs))
            assert (a.double() - b).norm() <= 1e-5 * b.norm() + 1e-20, f"result {place}, head {head}"


def both_ways(inputs: list[torch.Tensor], n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients, by the kernels and by the definition in fp64."""
    found = []
    for function, dtype in (
        (rwkv7_fused.rwkv7_inputs, torch.float32),
        (rwkv7_fused.rwkv7_inputs_reference, torch.float64),
    ):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
        out = function(*leaves, n)
        found.append([*out, *torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])])
    return found[0], found[1]


def test_a_nan_stays_in_its_head() -> None:
    inputs = [x.to(DEVICE) for x in inputs_of_wkv7(3, 1, 32, torch.float32)]
    inputs[4][1, 0, 2] = float("nan")
    *_, b = rwkv7_fused.rwkv7_inputs(*inputs, 16)
    assert b[1, 0, 0].isnan().all() and int(b.isnan().sum()) == 16


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [((1, 1, 5), torch.float32, 2e-6), ((70, 2, 130), torch.float32, 2e-6), ((20, 2, 40), *BF16)],
)
def test_mixed_values(shape, dtype, tolerance) -> None:
    torch.manual_seed(6)
    inputs = [*(torch.randn(shape).to(dtype) for _ in range(3)), torch.randn(shape[-1])]
    compare(rwkv7_fused.mix_values, rwkv7_fused.mix_values_reference, inputs, dtype, tolerance)
    inputs[2] *= 100
    compare(rwkv7_fused.mix_values, rwkv7_fused.mix_values_reference, inputs, dtype, tolerance)
