"""Divergence of relations against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaforge.training.relation_loss import relation_divergence


def by_token(ours: Tensor, theirs: Tensor, visible: Tensor) -> Tensor:
    """[b, heads, s, d] each: mean over heads, sum over the rest."""
    total = ours.new_zeros(())
    for b, h, token in (
        (b, h, t) for b in range(ours.shape[0]) for h in range(ours.shape[1]) for t in range(ours.shape[2])
    ):
        seen = visible[b, token]
        own, their = (x[b, h][seen] @ x[b, h, token] / math.sqrt(x.shape[-1]) for x in (ours, theirs))
        p, q = their.softmax(0), own.softmax(0)
        total = total + (p * (p.log() - q.log())).sum()
    return total / ours.shape[1]


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_it_is_that_of_what_each_token_sees(size: float) -> None:
    """With two documents, heads of other widths, and fewer heads of keys than of queries."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (
        [torch.randn(2, heads, 5, d, generator=generator, dtype=torch.float64) * size**0.5 for heads in (4, 2)]
        for d in (3, 6)
    )
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    visible = torch.ones(5, 5, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None, :])
    for one in ours:
        one.requires_grad_()
    found = relation_divergence(ours, theirs, visible)
    expected = sum(by_token(a, b, visible) for a, b in zip(ours, theirs, strict=True)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(found, ours), torch.autograd.grad(expected, ours)  # type: ignore[arg-type]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_one_token_and_alike_ones_have_nothing_to_learn() -> None:
    x = torch.randn(1, 2, 4, 3)
    visible = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    assert float(relation_divergence([x], [x], visible)) == 0
    single = torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3)
    assert float(relation_divergence([single[0]], [single[1]], visible[:, :1, :1])) == 0
    assert relation_divergence([x.bfloat16()], [-x.bfloat16() * 3], visible).dtype == torch.float32
    assert float(relation_divergence([x * torch.nan], [x], visible).isnan())
