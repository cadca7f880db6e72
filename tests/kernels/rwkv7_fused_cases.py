"""RWKV-7's fused arithmetic against its definition in torch.

``test_rwkv7_fused.py`` runs these in Triton's interpreter, which must be chosen before Triton is imported; on a GPU
``tests/gpu/test_rwkv7_fused.py`` runs them as they are.
"""

from __future__ import annotations

import os

import pytest
import torch

from megaforge.kernels import rwkv7_fused
from megaforge.kernels.rwkv7_fused.triton import load_triton

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device."""
    assert load_triton()[0] is not None
    monkeypatch.setattr(rwkv7_fused, "fused", lambda x: True)


def compare(function, reference, inputs: list, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and the gradients of all tensors that take one; the reference in fp64."""
    results = []
    for candidate, wide in ((function, False), (reference, True)):
        leaves = [None if x is None else x.detach().clone().to(DEVICE) for x in inputs]
        for x in leaves:
            if x is not None and x.is_floating_point():
                x.requires_grad_()
        floating = [x for x in leaves if x is not None and x.requires_grad]
        out = candidate(*(x.double() if wide and x is not None and x.requires_grad else x for x in leaves))
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(x.shape, generator=generator).to(DEVICE, dtype) for x in out]
        grads = torch.autograd.grad(out, floating, [w.to(x.dtype) for w, x in zip(weights, out, strict=True)])
        results.append([*out, *grads])
    for place, (ours, expected) in enumerate(zip(*results, strict=True)):
        error = (ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)
        assert error <= tolerance, f"result {place}: relative error {error:.2e}"


# The interpreter truncates to bf16 where a GPU rounds.
BF16 = (torch.bfloat16, 8e-3)


@pytest.mark.parametrize(
    ("s", "batch", "width", "count", "boundaries", "first", "dtype", "tolerance"),
    [
        (1, 2, 5, 6, True, True, torch.float32, 2e-6),
        (1, 2, 5, 6, False, False, torch.float32, 2e-6),
        (50, 3, 130, 6, True, True, torch.float32, 2e-6),
        (10, 3, 130, 2, False, True, torch.float32, 2e-6),
        (70, 2, 64, 1, True, False, torch.float32, 2e-6),
        (20, 2, 40, 3, True, True, *BF16),
    ],
)
def test_shifted_mixes(s, batch, width, count, boundaries, first, dtype, tolerance) -> None:
    torch.manual_seed(s)
    starts = torch.rand(s, batch) < 0.2 if boundaries else None
    before = torch.randn(batch, width).to(dtype) if first else None
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
        [x, x[0].clone(), starts, *(torch.rand(40) for _ in range(6))], torch.float32, 4e-6,
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
