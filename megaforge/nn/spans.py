"""Recurrences in spans of tokens (``--sequence-checkpoint``): the backward pass finds a sequence's inputs and the state
in front of each span; all else it computes again, one span at a time, the last one first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megaforge.nn.recompute import recomputed

# Tensors of tokens [s, ...], and what the tokens before have left, -> tensors of these tokens, and what they leave.
Step = Callable[[tuple[Tensor | None, ...], tuple[Tensor | None, ...]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def in_spans(
    step: Step, span: int, tokens: Sequence[Tensor | None], state: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """What ``step`` makes of whole sequences from ``state`` on, span after span.

    Args:
        step: depends on its arguments alone.
        span: tokens of each but the last.
        tokens: [s, ...] each; None stays None.

    Returns:
        [s, ...] each, the same as of one step over all up to the rounding of its inner order.
    """
    first = next(tensor for tensor in tokens if tensor is not None)
    if not torch.is_grad_enabled():
        return step(tuple(tokens), tuple(state))[0]

    def run(count: int, *tensors: Any) -> tuple[Tensor, ...]:
        made, left = step(tensors[:count], tensors[count:])
        return *made, *left

    out: list[tuple[Tensor, ...]] = []
    pieces = [[None] * -(-len(first) // span) if each is None else each.split(span) for each in tokens]
    left: Sequence[Tensor | None] = state
    for piece in zip(*pieces, strict=True):
        found = recomputed(True, run, len(tokens), *piece, *left)
        out.append(found[: len(found) - len(state)])
        left = found[len(found) - len(state) :]
    return tuple(map(torch.cat, zip(*out, strict=True)))
