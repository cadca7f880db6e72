"""The divergence of two heads over a split vocabulary against that of whole logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.divergence import vocab_parallel_linear_divergence
from tests.parallel.pool import RankPool

VOCAB, PADDED = 11, 16  # at tp 4 the last rank has padding alone
CASES = {"some": (7, 1.0, 1.0), "one token": (1, 1.0, 2.5), "large": (5, 300.0, 1.0), "none": (0, 1.0, 1.0)}


def tensors(case: str) -> tuple[Tensor, ...]:
    """The hidden states and matrices of both heads, and the gradient of the result."""
    tokens, size, _ = CASES[case]
    generator = torch.Generator().manual_seed(3)
    shapes = ((tokens, 6), (PADDED, 6), (tokens, 4), (PADDED, 4), (tokens,))
    h, w, oh, ow, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return h * size, w, oh * size, ow, g


def expected(case: str) -> tuple[Tensor, ...]:
    h, w, oh, ow, g = tensors(case)
    h.requires_grad_(), w.requires_grad_()
    own, their = (F.log_softmax((x @ m.t())[:, :VOCAB] / CASES[case][2], -1) for x, m in ((h, w), (oh, ow)))
    out = F.kl_div(own, their, reduction="none", log_target=True).sum(-1)
    return out.detach(), *torch.autograd.grad(out, (h, w), g)


def run(tp: int) -> list[tuple[Tensor, ...]]:
    """This rank's results, its partial gradient of the hidden states, and that of its rows."""
    ctx, found = ParallelContext.create(tp=tp) if tp > 1 else ParallelContext.single(), []
    for case in CASES:
        h, w, oh, ow, g = tensors(case)
        w, ow = (x.chunk(tp)[ctx.tp.rank].clone() for x in (w, ow))
        h.requires_grad_(), w.requires_grad_()
        out = vocab_parallel_linear_divergence(
            h, w, oh, ow, ctx=ctx, vocab_size=VOCAB, temperature=CASES[case][2], chunk_tokens=3
        )
        found.append((out.detach(), *torch.autograd.grad(out, (h, w), g)))
    return found


def test_it_is_that_of_the_whole_logits(ranks: RankPool) -> None:
    for parts in ([run(1)], ranks.run(4, run, 4)):
        for number, case in enumerate(CASES):
            out, hidden, weight = expected(case)
            assert (out >= 0).all()
            for rank in parts:
                torch.testing.assert_close(rank[number][0], out, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(sum(rank[number][1] for rank in parts), hidden, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(torch.cat([rank[number][2] for rank in parts]), weight, rtol=1e-11, atol=1e-11)


def test_a_head_is_not_far_from_itself_and_no_number_stays_one() -> None:
    h, w, *_ = tensors("some")
    more = {"ctx": ParallelContext.single(), "vocab_size": VOCAB}
    assert (vocab_parallel_linear_divergence(h, w, h, w, **more) == 0).all()  # type: ignore[arg-type]
    broken = h.clone()
    broken[1] = torch.nan
    for pair in ((broken, w, h, w), (h, w, broken, w)):
        assert vocab_parallel_linear_divergence(*pair, **more).isnan().tolist() == [False, True, *[False] * 5]  # type: ignore[arg-type]
    narrow = (x.bfloat16() for x in (h, w, 2 * h, w))
    assert vocab_parallel_linear_divergence(*narrow, **more).dtype == torch.float32  # type: ignore[arg-type]
