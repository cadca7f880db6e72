"""The head's cross-entropy over a split vocabulary against that of whole logits: gradients of single losses, and those
of their weighted sum, which are formed in the forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.cross_entropy import CHUNK_TOKENS, chunk_rows, vocab_parallel_linear_cross_entropy
from megaforge.parallel.linear_op import PlainLinear
from tests.parallel.pool import RankPool

VOCAB, PADDED = 11, 16  # at tp 4 the last rank has padding alone
# Tokens, size of the hidden states, and which weights are zero.
CASES: dict[str, tuple[int, float, slice]] = {
    "some": (7, 1.0, slice(2, 4)),
    "one token": (1, 1.0, slice(0)),
    "large": (5, 300.0, slice(0)),
    "no weight": (4, 1.0, slice(None)),
    "none": (0, 1.0, slice(0)),
}
# How the result is used: factors of the weighted sum and of the sum of squares of single losses.
USES = ((0.5, 0.0), (0.0, 2.0), (0.5, 2.0))


def tensors(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, matrix, labels and their weights."""
    tokens, size, off = CASES[case]
    generator = torch.Generator().manual_seed(3)
    h, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((tokens, 6), (PADDED, 6)))
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weights[off] = 0
    return h * size, w, torch.randint(0, VOCAB, (tokens,), generator=generator), weights


def expected(case: str, use: tuple[float, float]) -> tuple[Tensor, ...]:
    h, w, labels, weights = tensors(case)
    h.requires_grad_(), w.requires_grad_()
    losses = F.cross_entropy((h @ w.t())[:, :VOCAB], labels, reduction="none")
    total = (losses * weights).sum()
    out = use[0] * total + use[1] * losses.square().sum()
    return losses.detach(), total.detach(), *torch.autograd.grad(out, (h, w))


def run(tp: int) -> list[tuple[Tensor, ...]]:
    """This rank's results, its partial gradient of the hidden states, and that of its rows."""
    ctx, found = ParallelContext.create(tp=tp) if tp > 1 else ParallelContext.single(), []
    for case in CASES:
        for use in USES:
            h, w, labels, weights = tensors(case)
            w = w.chunk(tp)[ctx.tp.rank].clone()
            h.requires_grad_(), w.requires_grad_()
            more: dict[str, Any] = {"ctx": ctx, "vocab_size": VOCAB, "weights": weights, "chunk_tokens": 3}
            losses, correct, total = vocab_parallel_linear_cross_entropy(h, w, labels, **more)
            assert total is not None and correct.dtype == torch.bool
            out = use[0] * total + use[1] * losses.square().sum()
            kept = torch.autograd.grad(out, (h, w), retain_graph=True)
            again = torch.autograd.grad(out, (h, w))  # when what was formed has been given away
            for one, other in zip(kept, again, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
            found.append((losses.detach(), total.detach(), *kept))
    return found


def test_it_is_that_of_the_whole_logits(ranks: RankPool) -> None:
    uses = [(case, use) for case in CASES for use in USES]
    for parts in ([run(1)], ranks.run(4, run, 4)):
        for number, (case, use) in enumerate(uses):
            losses, total, hidden, weight = expected(case, use)
            for rank in parts:
                torch.testing.assert_close(rank[number][0], losses, rtol=1e-11, atol=1e-11)
                torch.testing.assert_close(rank[number][1], total, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(sum(rank[number][2] for rank in parts), hidden, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(torch.cat([rank[number][3] for rank in parts]), weight, rtol=1e-11, atol=1e-11)


class Counted(PlainLinear):
    """How often logits are formed."""

    def __init__(self) -> None:
        self.products = 0

    def forward(self, *args: Any) -> Tensor:
        self.products += 1
        return super().forward(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_sum_needs_no_logits_again(dtype: torch.dtype) -> None:
    h, w, labels, weights = tensors("some")
    more: dict[str, Any] = {"ctx": ParallelContext.single(), "vocab_size": VOCAB, "chunk_tokens": 4}
    found = []
    for given in (weights.float(), None):
        hidden, weight, op = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), Counted()
        losses, _, total = vocab_parallel_linear_cross_entropy(hidden, weight, labels, weights=given, op=op, **more)
        (0.3 * (total if total is not None else (losses * weights.float()).sum())).backward()
        assert op.products == (2 if given is not None else 4)
        assert hidden.grad is not None and weight.grad is not None
        found.append((losses.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        close = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    op = Counted()
    with torch.no_grad():  # an evaluation forms no gradients
        vocab_parallel_linear_cross_entropy(h, w, labels, weights=weights, op=op, **more)
    assert op.products == 2


def test_no_number_stays_one() -> None:
    h, w, labels, weights = tensors("some")
    h[1] = torch.nan
    h.requires_grad_()
    losses, _, total = vocab_parallel_linear_cross_entropy(
        h, w, labels, ctx=ParallelContext.single(), vocab_size=VOCAB, weights=weights
    )
    assert total is not None and total.isnan() and losses.isnan().tolist() == [False, True, *[False] * 5]
    assert torch.autograd.grad(total, h)[0].isnan().any(1).tolist() == [False, True, *[False] * 5]


def test_a_gpu_forms_more_logits_at_once() -> None:
    assert chunk_rows("cpu", 65536) == CHUNK_TOKENS
    assert [chunk_rows("cuda", columns) for columns in (1, 32768, 65536, 1 << 20)] == [8192, 8192, 4096, 1024]
    assert chunk_rows("meta", 50304) == chunk_rows("cuda", 50304) == (1 << 28) // 50304
