"""The norm over split features against the norm over whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaforge.kernels.pointwise.reference import rms_norm_reference
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.sharded_norm import sharded_rms_norm
from tests.parallel.pool import RankPool

CASES = {"some": (3, 2, 8), "one token": (1, 1, 4), "zeros": (2, 1, 8)}


def tensors(case: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, w, g = (torch.randn(CASES[case], generator=generator, dtype=torch.float64) for _ in range(3))
    return x * (case != "zeros"), w, g


def run(tp: int) -> list[tuple[Tensor, ...]]:
    """Of each case, and each kind of weight: this rank's part of the output and of the gradients."""
    ctx = ParallelContext.create(tp=tp) if tp > 1 else ParallelContext.single()
    found = []
    for case in CASES:
        x, w, g = (t.chunk(tp, -1)[ctx.tp.rank] for t in tensors(case))
        for weight in (w.flatten(0, -2)[0], w):
            x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = sharded_rms_norm(x, weight, 1e-6, ctx.tp)
            found.append((out.detach(), *torch.autograd.grad(out, (x, weight), g)))
    return found


def test_parts_are_those_of_the_whole(ranks: RankPool) -> None:
    expected = []
    for case in CASES:
        x, w, g = tensors(case)
        for weight in (w.flatten(0, -2)[0], w):
            x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = rms_norm_reference(x, weight, 1e-6)
            expected.append((out.detach(), *torch.autograd.grad(out, (x, weight), g)))
    for parts in ([run(1)], ranks.run(2, run, 2)):
        for number, wholes in enumerate(expected):
            for ours, whole in zip(zip(*(rank[number] for rank in parts), strict=True), wholes, strict=True):
                torch.testing.assert_close(torch.cat(ours, -1), whole, rtol=1e-12, atol=1e-12)


def test_narrow_types_keep_their_type() -> None:
    x, w = torch.randn(4, 8).bfloat16(), torch.ones(4, 8)
    out = sharded_rms_norm(x, w, 1e-6, ParallelContext.single().tp)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, sharded_rms_norm(x, w[0], 1e-6, ParallelContext.single().tp))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    assert sharded_rms_norm(torch.zeros(shape), torch.ones(8), 1e-6, ParallelContext.single().tp).shape == shape
