"""Where the residual stream enters and leaves the tensor-parallel part of a sublayer."""

from __future__ import annotations

from torch import Tensor

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.linear_op import LinearOp
from megaforge.parallel.mappings import (
    column_parallel_linear,
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
        self.sequence_parallel = sequence_parallel and ctx.tp.size > 1
        self._enter = gather_from_sequence_parallel if self.sequence_parallel else copy_to_tensor_parallel
        self._exit = reduce_scatter_to_sequence_parallel if self.sequence_parallel else reduce_from_tensor_parallel

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream -> region: [s(/tp), b, h] -> [s, b, h]."""
        return self._enter(x, self.axis)

    def enter_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, op: LinearOp) -> Tensor:
        """:meth:`enter` and a column-parallel linear layer: [s(/tp), b, h] -> [s, b, out/tp]."""
        sequence, overlap = self.sequence_parallel, self.overlap
        return column_parallel_linear(x, weight, bias, op, self.axis, sequence_parallel=sequence, overlap=overlap)

    def exit(self, x: Tensor) -> Tensor:
        """Partial sums [s, b, h] -> residual stream [s(/tp), b, h]."""
        return self._exit(x, self.axis)
