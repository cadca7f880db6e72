"""The reference of a policy: the model as it was before there were adapters, which stand beside its matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from megaforge.parallel.agree import reduced
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import linears
from megaforge.peft.adapter import AdaptedOp


def has_adapters(model: nn.Module, ctx: ParallelContext) -> bool:
    """Whether there are any, on some rank: of a stage's layers none may have one. Collective."""
    own = any(isinstance(layer.op, AdaptedOp) for _, layer in linears(model))
    return bool(reduced(ctx, own, dist.ReduceOp.MAX))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before there were adapters."""
    layers = [(layer, layer.op) for _, layer in linears(model)]
    for layer, op in layers:
        if isinstance(op, AdaptedOp):
            layer.op = op.base
    try:
        yield
    finally:
        for layer, op in layers:
            layer.op = op
