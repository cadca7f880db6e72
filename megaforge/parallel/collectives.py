"""Collectives under the name that this torch has for them: 2.13 renamed two and warns of the old names."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.context import Axis

Collective = Callable[..., dist.Work | None]


def _first(*names: str) -> Collective:
    """The first of ``names`` that ``torch.distributed`` has."""
    found: Collective = next(getattr(dist, name) for name in names if hasattr(dist, name))
    return found


# (output, input, *, group, async_op): every rank's input side by side along dim 0, on every rank
all_gather_single = _first("all_gather_single", "all_gather_into_tensor")
# (output, input, *, group, async_op): the sum over ranks; each rank gets its own part along dim 0
reduce_scatter_single = _first("reduce_scatter_single", "reduce_scatter_tensor")


def max_over(x: Tensor, axis: Axis | None) -> Tensor:
    """``x`` itself, every element now the largest of those that the ranks of ``axis`` hold; None: of this rank alone.
    Not differentiable."""
    if axis is not None and axis.size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x
