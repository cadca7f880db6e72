"""Where the residual stream enters and leaves the tensor-parallel part of a sublayer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.collectives import reduce_scatter_single
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.mappings import (
    all_gather_first,
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
)


class TensorParallelRegion:
    """The pair of collectives around a mixer or FFN, chosen once for the layout.

    Outside, on the residual stream, a tensor is replicated over tp ([s, b, h]) or, under sequence parallelism, cut
    over the sequence ([s/tp, b, h]). Inside, every rank sees every token and computes its own heads or columns, so a
    gradient inside is a partial sum over tp.
    """

    def __init__(self, ctx: ParallelContext, sequence_parallel: bool, *, overlap: bool = True) -> None:
        """``overlap``: a linear layer at the entrance computes its weight's gradient while its input's travels."""
        self.axis = ctx.tp
        self.overlap = overlap
        self._choose(sequence_parallel and ctx.tp.size > 1)

    def _choose(self, sequence_parallel: bool) -> None:
        self.sequence_parallel = sequence_parallel
        self._enter = gather_from_sequence_parallel if sequence_parallel else copy_to_tensor_parallel
        self._exit = reduce_scatter_to_sequence_parallel if sequence_parallel else reduce_from_tensor_parallel

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the residual stream is on every rank, for sequences of any length; there is no gradient."""
        before = self.sequence_parallel
        self._choose(False)
        try:
            yield
        finally:
            self._choose(before)

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream -> region: [s(/tp), b, h] -> [s, b, h]."""
        return self._enter(x, self.axis)

    def gather(self, x: Tensor) -> Tensor:
        """What :meth:`enter` gives; not differentiable."""
        return all_gather_first(x, self.axis) if self.sequence_parallel else x

    def start_reduction(self, partial: Tensor) -> tuple[Tensor, dist.Work | None]:
        """:meth:`enter`'s backward for a gradient inside, which may be overwritten: the gradient outside, complete once
        the work (None: now) has been waited for."""
        group = self.axis.group
        if not self.sequence_parallel:
            return partial, dist.all_reduce(partial, group=group, async_op=self.overlap)
        out = partial.new_empty((partial.shape[0] // self.axis.size, *partial.shape[1:]))
        return out, reduce_scatter_single(out, partial, group=group, async_op=self.overlap)

    def own(self, x: Tensor) -> Tensor:
        """What this rank has outside of a tensor inside that is the same on every rank; not differentiable."""
        return x.chunk(self.axis.size)[self.axis.rank] if self.sequence_parallel else x

    def reduce(self, partial: Tensor) -> Tensor:
        """What :meth:`exit` gives of partial sums, which may be overwritten; not differentiable. The gradient inside is
        :meth:`gather` of that outside."""
        if self.sequence_parallel:
            out = partial.new_empty((partial.shape[0] // self.axis.size, *partial.shape[1:]))
            reduce_scatter_single(out, partial.contiguous(), group=self.axis.group)
            return out
        partial = partial.contiguous()
        dist.all_reduce(partial, group=self.axis.group)
        return partial

    def exit(self, x: Tensor) -> Tensor:
        """Partial sums [s, b, h] -> residual stream [s(/tp), b, h]."""
        return self._exit(x, self.axis)
