"""What of a training step bench_gpu_kernels.py times beside kernels: the head with its loss, and norms of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from megaforge.optim.clip import sum_of_squares
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.cross_entropy import CHUNK_TOKENS, vocab_parallel_linear_cross_entropy

HEAD_SHAPES = ((32768, 4096, 65536), (8192, 2048, 50304))  # tokens, hidden size, vocabulary
NORM_SHAPES = ((400, 1 << 20), (400, 1 << 12))  # gradients, elements of each


def head(device: str, tokens: int, hidden: int, vocab: int) -> dict[str, Callable[[], object]]:
    """Forward + backward of the head and its loss: with its gradients formed in the forward pass, in chunks as the
    device has room for; not so; and not so in chunks as on a CPU."""
    x, weight = (torch.randn(n, hidden, device=device).bfloat16().requires_grad_() for n in (tokens, vocab))
    labels, weights = torch.randint(0, vocab, (tokens,), device=device), torch.ones(tokens, device=device)
    context = ParallelContext.single(device)

    def once(at_once: bool, chunk: int | None) -> object:
        given = weights if at_once else None
        scored = vocab_parallel_linear_cross_entropy(
            x, weight, labels, ctx=context, vocab_size=vocab, weights=given, chunk_tokens=chunk
        )
        total = (scored.losses * weights).sum() if scored.total is None else scored.total
        return torch.autograd.grad(total / tokens, [x, weight])

    return {
        "formed at once": partial(once, True, None),
        "formed again": partial(once, False, None),
        "formed again, chunks of 1,024": partial(once, False, CHUNK_TOKENS),
    }


def norms(device: str, parameters: int, elements: int) -> dict[str, Callable[[], object]]:
    """The sum of squares of as many gradients: by one list, and one by one."""
    gradients = [torch.randn(elements, device=device) for _ in range(parameters)]
    return {
        "one list": partial(sum_of_squares, gradients),
        "one by one": lambda: sum(sum_of_squares([gradient]) for gradient in gradients),
    }


def step_calls(
    device: str = "cuda",
    heads: Sequence[tuple[int, int, int]] = HEAD_SHAPES,
    lists: Sequence[tuple[int, int]] = NORM_SHAPES,
) -> Iterator[tuple[str, str, dict[str, Callable[[], object]]]]:
    """(shape, what, the ways to do it) of every row; the tensors of one at a time."""
    for shape in heads:
        yield " x ".join(map(str, shape)), "head and loss, fwd+bwd", head(device, *shape)
    for count, elements in lists:
        yield f"{count} x {elements}", "sum of squares", norms(device, count, elements)
