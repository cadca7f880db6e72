"""Which tokens of a sequence a rank routes to experts, and how their outputs come back to the residual stream.

Experts may be laid out independently of the dense layers around them ("parallel folding", Liu et al., arXiv
2504.14960). Either every tp rank routes every token to its shard of every expert's width (:class:`ReplicatedTokens`),
or the tokens are sharded over the tp ranks, so that each is sent to its experts once (:class:`ShardedTokens`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaforge.parallel.collectives import all_gather_single
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.expert_columns import columns_to_rows, rows_to_columns
from megaforge.parallel.mappings import reduce_from_tensor_parallel, scale_gradient
from megaforge.parallel.region import TensorParallelRegion

Mix = Callable[[Tensor], Tensor]


def _own_rows(length: int, axis: Axis) -> tuple[int, int]:
    """(start, stop) of this rank's rows; where they do not divide, the last ranks have fewer, or none."""
    share = -(-length // axis.size)
    return min(axis.rank * share, length), min((axis.rank + 1) * share, length)


def _gather_rows(x: Tensor, axis: Axis, length: int) -> Tensor:
    """All ranks' rows of dim 0, in order: [own, ...] -> [length, ...]."""
    share = -(-length // axis.size)
    out = x.new_empty((share * axis.size, *x.shape[1:]))
    all_gather_single(out, _with_rows(x, share - x.shape[0]).contiguous(), group=axis.group)
    return out[:length]


def _with_rows(x: Tensor, missing: int) -> Tensor:
    """With so many rows of zeros behind."""
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


class _ScatterTokens(torch.autograd.Function):
    """Forward: this rank's rows of dim 0 (replicated input). Backward: all-gather along dim 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x.shape[0]
        start, stop = _own_rows(x.shape[0], axis)
        return x[start:stop].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(grad, ctx.axis, ctx.length), None


class _GatherTokens(torch.autograd.Function):
    """Forward: all-gather along dim 0. Backward: this rank's rows of dim 0.

    The slice is the whole gradient only if what follows computes the same thing on every rank.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, length: int) -> Tensor:
        ctx.rows = _own_rows(length, axis)
        return _gather_rows(x, axis, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.rows
        return grad[start:stop].contiguous(), None, None


class ReplicatedTokens:
    """Each tp rank routes every token. The experts' outputs are partial sums over tp, and all gradients are partial."""

    def __init__(self, ctx: ParallelContext, region: TensorParallelRegion) -> None:
        self.region, self.tp, self.cp = region, ctx.tp, ctx.cp
        # Over what a dispatcher sends tokens: nothing, as every rank has its share of every expert and every token.
        self.expert_axes = (Axis("ep"), Axis("etp"))

    def enter(self, x: Tensor, mix: Mix | None, whole: bool) -> tuple[Tensor, Tensor | None]:
        """Normed residual stream -> the tokens this rank routes, and every token inside the region if ``whole``.

        Args:
            x: [s(/tp), b, h].
            mix: applied inside the region, to every token in order.
            whole: whether the caller reads the second result.

        Returns:
            [own, b, h] and [s, b, h] (or None).
        """
        inside = self.region.enter(x)
        inside = inside if mix is None else mix(inside)
        return inside, inside

    def exit(self, routed: Tensor, shared: Tensor | None, length: int) -> Tensor:
        """What experts made of this rank's tokens, plus partial sums over tp for every token -> residual stream.

        Args:
            routed: [own, b, h].
            shared: [s, b, h], or None.
            length: s.
        """
        return self.region.exit(routed if shared is None else routed + shared)

    def to_heads(self, x: Tensor, length: int) -> Tensor:
        """Own tokens [own, b, ..., w (here / tp)] -> every token inside the region, of each this rank's columns:
        [s, b, ..., w / tp]."""
        return x

    def from_heads(self, x: Tensor) -> Tensor:
        """The opposite way."""
        return x

    def total(self, partial: Tensor) -> Tensor:
        """The sum over the tokens of all tp ranks, of ``partial`` = the sum over this rank's; what is made of it
        enters the loss on every tp rank, and gradients inside the region come out partial."""
        return scale_gradient(partial, 1 / self.tp.size)

    def gather(self, x: Tensor, positions_S: Tensor) -> Tensor:
        """Facts about own tokens, [own, ...] -> those about all S tokens of the sequences, in order: [S, ...]. Not
        differentiable.

        Args:
            positions_S: int64 [s], where in its sequence each of the cp rank's tokens is.
        """
        if self.cp.size == 1:
            return x
        length = positions_S.shape[0] * self.cp.size
        whole = torch.empty((length, *x.shape[1:]), dtype=x.dtype, device=x.device)
        whole[_gather_rows(positions_S, self.cp, length)] = _gather_rows(x, self.cp, length)
        return whole

    def own(self, x: Tensor, positions_S: Tensor) -> Tensor:
        """This rank's rows of what :meth:`gather` gave: [S, ...] -> [own, ...]."""
        return x[positions_S]

    def sequence_total(self, counts: Tensor) -> Tensor:
        """Counts over a cp rank's tokens -> over the sequence. Not differentiable."""
        return reduce_from_tensor_parallel(counts.detach(), self.cp)


class ShardedTokens(ReplicatedTokens):
    """The tp ranks share the tokens out. The experts' outputs are whole for the rank's own tokens; inside the region
    the gradient of the other tokens is zero here, which makes it partial like any other."""

    def __init__(self, ctx: ParallelContext, region: TensorParallelRegion) -> None:
        super().__init__(ctx, region)
        self.expert_axes = (ctx.ep, ctx.etp)

    def enter(self, x: Tensor, mix: Mix | None, whole: bool) -> tuple[Tensor, Tensor | None]:
        if mix is None and not whole:
            # The region would gather what is cut again: under sequence parallelism the residual stream is the cut.
            return self._cut(x), None
        _, inside = super().enter(x, mix, whole)
        assert inside is not None
        start, stop = _own_rows(inside.shape[0], self.tp)
        return inside[start:stop], inside

    def exit(self, routed: Tensor, shared: Tensor | None, length: int) -> Tensor:
        out = routed
        if self.tp.size > 1 and not self.region.sequence_parallel:
            out = _GatherTokens.apply(routed, self.tp, length)
        return out if shared is None else out + self.region.exit(shared)

    def to_heads(self, x: Tensor, length: int) -> Tensor:
        missing = -(-length // self.tp.size) - x.shape[0]
        return rows_to_columns(_with_rows(x, missing), self.tp)[:length]

    def from_heads(self, x: Tensor) -> Tensor:
        length = x.shape[0]
        start, stop = _own_rows(length, self.tp)
        return columns_to_rows(_with_rows(x, -length % self.tp.size), self.tp)[: stop - start]

    def _cut(self, x: Tensor) -> Tensor:
        return x if self.tp.size == 1 or self.region.sequence_parallel else _ScatterTokens.apply(x, self.tp)

    def total(self, partial: Tensor) -> Tensor:
        return reduce_from_tensor_parallel(partial, self.tp)

    def gather(self, x: Tensor, positions_S: Tensor) -> Tensor:
        x = x if self.tp.size == 1 else _gather_rows(x, self.tp, positions_S.shape[0])
        return super().gather(x, positions_S)

    def own(self, x: Tensor, positions_S: Tensor) -> Tensor:
        start, stop = _own_rows(positions_S.shape[0], self.tp)
        return super().own(x, positions_S[start:stop])


def make_expert_tokens(ctx: ParallelContext, region: TensorParallelRegion) -> ReplicatedTokens:
    """The cheaper one that the layout allows: no exchange at all while experts are laid out like dense layers."""
    return (
        ReplicatedTokens(ctx, region)
        if ctx.ep.size == 1 and ctx.etp.size == ctx.tp.size
        else ShardedTokens(ctx, region)
    )
