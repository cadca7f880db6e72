"""RWKV-7's mixes of tokens in plain torch; ``test_triton.py`` tests the kernels, ``test_rwkv7_inputs.py`` the rest."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels import rwkv7_fused
from megaforge.kernels.rwkv7_fused import mix_tokens, previous_tokens
from tests.nn.support import assert_close, random


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_mixes_and_their_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of tokens the backward pass takes at once."""
    monkeypatch.setattr("megaforge.kernels.rwkv7_fused.mixes.CPU_ELEMENTS_AT_ONCE", at_once)
    leaves = [random(7, 2, 5), random(7, 2, 5, seed=1), random(5, seed=2), random(5, seed=3)]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.clone().requires_grad_() for leaf in leaves]
    got = mix_tokens(ours[0], ours[1], ours[2:])
    expected = [theirs[0] + (theirs[1] - theirs[0]) * c for c in theirs[2:]]
    for number, (out, reference) in enumerate(zip(got, expected, strict=True)):
        assert_close(out, reference, 1e-14, f"mix {number}")
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(got)).backward()
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(expected)).backward()
    for name, a, b in zip(("x", "previous", "c0", "c1"), ours, theirs, strict=True):
        assert_close(a.grad, b.grad, 1e-14, name)


def test_bf16_mixes_sum_their_gradients_in_fp32() -> None:
    x, previous = random(3000, 1, 4).bfloat16(), random(3000, 1, 4, seed=1).bfloat16()
    coefficient = torch.rand(4, requires_grad=True)
    (out,) = mix_tokens(x, previous, [coefficient])
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert coefficient.grad is not None and coefficient.grad.dtype == torch.float32
    assert_close(coefficient.grad, (previous.double() - x.double()).sum((0, 1)), 1e-5, "coefficient")


def test_chunks_have_their_own_predecessors() -> None:
    """What a rank of cp holds; and no tokens at all."""
    x, first = random(6, 2, 3), random(2, 2, 3, seed=1)
    previous = previous_tokens(x, first, None)
    assert torch.equal(previous, torch.cat([first[:1], x[:2], first[1:], x[3:5]]))
    assert previous_tokens(x[:0], None, None).shape == (0, 2, 3)


def test_heads_of_other_sizes_are_said_to_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rwkv7_fused, "say_no_triton", lambda what, reason: said.append(reason))
    monkeypatch.setattr(rwkv7_fused, "fused", lambda x: True)
    x, vector = random(5, 2, 6), random(6)
    for ours, expected in zip(
        rwkv7_fused.rwkv7_inputs(x, vector, x, vector, x, vector, vector, 3),
        rwkv7_fused.rwkv7_inputs_reference(x, vector, x, vector, x, vector, vector, 3), strict=True,
    ):  # fmt: skip
        assert_close(ours, expected, 1e-14, "heads of 3 channels")
    assert said == ["heads have 3 channels, not one of 16, 32, 64, 128"]
