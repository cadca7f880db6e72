"""RWKV-7's arithmetic in front of WKV-7: the function with its own backward pass against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.rwkv7_fused import rwkv7_inputs, rwkv7_inputs_reference

NAMES = ("decay", "w0", "rate", "a0", "key", "k_k", "k_a")
N = 4


def make_inputs(s: int = 5, batch: int = 2, channels: int = 3 * N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide, vector = (s, batch, channels), (channels,)
    shapes = (wide, vector, wide, vector, wide, vector, vector)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(function, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and all gradients of a fixed functional."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*inputs, N)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, directions)]


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
def test_outputs_and_gradients_match_the_definition(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of tokens is taken at once."""
    monkeypatch.setattr("megaforge.kernels.rwkv7_fused.inputs.CPU_ELEMENTS_AT_ONCE", at_once)
    results = (run(f, make_inputs()) for f in (rwkv7_inputs, rwkv7_inputs_reference))
    for name, got, expected in zip(("log_w", "k", "a", "b", *NAMES), *results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, msg=name)


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(s=2)]
    assert torch.autograd.gradcheck(lambda *x: rwkv7_inputs(*x, N), inputs)


def test_a_key_of_zeros_gives_no_nan() -> None:
    inputs = make_inputs()
    inputs[4][2] = 0
    for got, expected in zip(run(rwkv7_inputs, inputs), run(rwkv7_inputs_reference, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("saturation", [-60.0, 60.0])
def test_equal_tokens_with_decays_and_rates_at_either_end(saturation: float) -> None:
    """In fp32, against the definition in fp64: a run of one token, sigmoids at 0 and 1, keys of very unequal size."""
    inputs = [x.float() for x in make_inputs()]
    for place in (0, 2, 4):
        inputs[place] = inputs[place][:1].expand_as(inputs[place]).clone()
    inputs[1].fill_(saturation)
    inputs[3].fill_(-saturation)
    inputs[4][:, 0] *= 1e10
    inputs[4][:, 1] *= 1e-6
    got, expected = run(rwkv7_inputs, inputs), run(rwkv7_inputs_reference, [x.double() for x in inputs])
    for name, ours, theirs in zip(("log_w", "k", "a", "b", *NAMES), got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-5 * float(theirs.abs().max()), msg=name)


def test_bf16_is_rounded_once() -> None:
    """Matrices' outputs in bf16, vectors in fp32: the arithmetic is fp32, as in the definition."""
    inputs = [x.bfloat16() if x.dim() == 3 else x.float() for x in make_inputs()]
    got, expected = rwkv7_inputs(*inputs, N), rwkv7_inputs_reference(*inputs, N)
    assert [x.dtype for x in got] == [torch.float32] + [torch.bfloat16] * 3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=4e-3, atol=1e-6
        )  # one bf16 step where fp32 differs in its last bit
