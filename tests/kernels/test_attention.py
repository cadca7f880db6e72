"""The blockwise 16-bit attention against the plain fp64 formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaforge.kernels import attention
from megaforge.kernels.attention import _BlockwiseAttention, causal_attention


def inputs(length: int, groups: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 16), (2, groups, length, 16), (2, groups, length, 16), (2, 4, length, 16)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def document_mask(length: int) -> Tensor:
    documents = (torch.arange(length)[None, :] >= torch.tensor([[5], [length // 2]])).long()
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 24, 29])
def test_blocks_are_exact(monkeypatch: pytest.MonkeyPatch, length: int, packed: bool) -> None:
    """In wider arithmetic (fp32 is what the blocks accumulate in) only summation order is left."""
    monkeypatch.setattr(attention, "ROWS", 8)
    *qkv, direction = inputs(length)
    mask = document_mask(length) if packed else None
    ours = [t.float().requires_grad_() for t in qkv]
    theirs = [t.clone().requires_grad_() for t in qkv]
    out, expected = _BlockwiseAttention.apply(*ours, mask), formula(*theirs, mask)
    assert relative(out.detach(), expected.detach()) < 1e-6
    found = torch.autograd.grad(out, ours, direction.float())
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        if float(theirs_grad.norm()) > 0:  # one token alone has no say in its softmax
            assert relative(ours_grad, theirs_grad) < 2e-6


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_as_good_as_bf16_can_be(packed: bool, groups: int) -> None:
    *qkv, direction = inputs(150, groups)
    mask = document_mask(150) if packed else None
    ours = [t.bfloat16().requires_grad_() for t in qkv]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out, expected = causal_attention(*ours, mask), formula(*theirs, mask)
    assert out.dtype == torch.bfloat16
    assert relative(out.detach(), expected.detach()) < 1e-2
    found = torch.autograd.grad(out, ours, direction.bfloat16())
    for ours_grad, theirs_grad in zip(found, torch.autograd.grad(expected, theirs, direction), strict=True):
        assert relative(ours_grad, theirs_grad) < 1.5e-2


def test_wide_types_take_the_fused_kernel_and_agree() -> None:
    *qkv, _ = inputs(20, 2)
    for mask in (None, document_mask(20)):
        assert relative(causal_attention(*qkv, mask), formula(*qkv, mask)) < 1e-13
