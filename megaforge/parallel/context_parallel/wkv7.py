"""WKV-7 over sequences that the ranks of cp share: every chunk starts from the state that all chunks before it leave.

A chunk takes the state S before it to ``S P + Q``; only these [N, N] matrices are exchanged, and every rank combines
them in the order of the chunks. The backward pass is the mirror image: the gradient G of the state after a chunk
becomes ``G P^T + E`` before it, where E comes from the chunk's own outputs. (The same scheme as ``ops/cp`` of
flash-linear-attention and RWKV-LM's ``run_rwkv7_context_parallelism.py``.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.kernels.wkv7 import wkv7, wkv7_state_gradient, wkv7_summary
from megaforge.kernels.wkv7.backend import WKV7
from megaforge.parallel.context_parallel.shard import ContextParallelShard

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def context_parallel_wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    document_start: Tensor | None,
    shards: ContextParallelShard,
    function: WKV7 = wkv7,
) -> Tensor:
    """WKV-7 from the beginning of the sequences.

    Args:
        r, log_w, k, v, a, b: [s / cp, b, H, N], as :func:`megaforge.kernels.wkv7.wkv7`, the tokens of this rank.
        document_start: bool [s / cp, b]; None: no document starts after the sequence does.
        shards: which chunks they are.
        function: the implementation of WKV-7 on each.

    Returns:
        y [s / cp, b, H, N] in the dtype of ``v``.
    """
    if shards.axis.size == 1:
        return function(r, log_w, k, v, a, b, None, document_start)[0]
    count = len(shards.chunks)
    starts = [None] * count if document_start is None else document_start.chunk(count)
    pieces = cast("list[_Inputs]", list(zip(*(x.chunk(count) for x in (r, log_w, k, v, a, b)), strict=True)))
    summaries = [torch.stack(wkv7_summary(*piece, start)) for piece, start in zip(pieces, starts, strict=True)]
    through, added = shards.gather(torch.stack(summaries)).unbind(1)
    states = _states_before(through, added)
    out = []
    for number, piece, start in zip(shards.chunks, pieces, starts, strict=True):
        out.append(function(*piece, states[number], start))
    outputs, finals = (torch.stack(part) for part in zip(*out, strict=True))
    inputs = (x.detach() for x in (r, log_w, k, v, a, b))
    return _PassStateGradient.apply(outputs, finals, through, *inputs, document_start, shards).flatten(0, 1)


def _states_before(through: Tensor, added: Tensor) -> list[Tensor]:
    """The state before each chunk, from all chunks' P and Q, each [chunks, b, H, N, N]."""
    states = [torch.zeros_like(added[0])]
    for product, state in zip(through[:-1], added[:-1], strict=True):
        states.append(states[-1] @ product + state)
    return states


def _gradients_after(through: Tensor, own: Tensor) -> list[Tensor]:
    """The gradient of the state after each chunk, from all chunks' P and E, each [chunks, b, H, N, N]."""
    gradients = [torch.zeros_like(own[0])]
    for product, gradient in zip(through[1:].flip(0), own[1:].flip(0), strict=True):
        gradients.append(gradients[-1] @ product.transpose(-1, -2) + gradient)
    return gradients[::-1]


class _PassStateGradient(torch.autograd.Function):
    """Forward: y of this rank's chunks as it is. Backward: also gives each chunk's last state its gradient, which
    comes from the outputs of all later chunks, on whichever rank; one all-gather."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, finals: Tensor, through: Tensor, *rest: Any) -> Tensor:
        *inputs, document_start, shards = rest
        ctx.save_for_backward(through, *inputs, document_start)
        ctx.shards, ctx.final_dtype = shards, finals.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        through, *inputs, document_start = ctx.saved_tensors
        count = len(ctx.shards.chunks)
        starts = [None] * count if document_start is None else document_start.chunk(count)
        pieces = zip(*(x.chunk(count) for x in inputs), dy.unbind(), starts, strict=True)
        own = torch.stack([wkv7_state_gradient(*piece) for piece in pieces])
        after = _gradients_after(through, ctx.shards.gather(own))
        dfinals = torch.stack([after[number] for number in ctx.shards.chunks])
        return dy, dfinals.to(ctx.final_dtype), *(None,) * (len(inputs) + 3)
