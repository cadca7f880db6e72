"""The output head on a GPU: gradients that are formed in the forward pass, chunks added in fp32, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.cross_entropy import vocab_parallel_linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_the_head_is_that_of_whole_logits(dtype: torch.dtype, tolerance: float, at_once: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, hidden, vocab = 300, 64, 1000
    x, w = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (tokens, 1024))
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    exact = [t.double().requires_grad_() for t in (x, w)]
    losses = F.cross_entropy((exact[0] @ exact[1].t())[:, :vocab], labels, reduction="none")
    expected = [losses, *torch.autograd.grad(0.01 * (losses * weights).sum(), exact)]
    ours = [t.cuda().requires_grad_() for t in (x, w)]
    found, _, total = vocab_parallel_linear_cross_entropy(
        *ours,
        labels.cuda(),
        ctx=ParallelContext.single("cuda"),
        vocab_size=vocab,
        weights=weights.cuda() if at_once else None,
        chunk_tokens=128,
    )
    loss = 0.01 * ((found * weights.cuda()).sum() if total is None else total)
    for one, other in zip([found, *torch.autograd.grad(loss, ours)], expected, strict=True):
        error = (one.detach().double().cpu() - other.detach()).norm() / other.detach().norm()
        assert error < tolerance
