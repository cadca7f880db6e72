"""Rows of tokens to the ranks of their experts and back: exchange over ep, gather over etp, and the same backwards.

The steps are those of Megatron-LM's token dispatchers (github.com/NVIDIA/Megatron-LM, core/transformer/moe); the first
and the last, which copy tokens to rows and add rows up, are :mod:`megaforge.kernels.moe_routing`'s. What one step
learns and a later one needs is in a :class:`DispatchPlan` that the caller carries, so any number of micro-batches may
be under way, and a recomputed forward pass makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.mappings import gather_from_sequence_parallel, reduce_scatter_to_sequence_parallel


@dataclass(frozen=True)
class DispatchPlan:
    """How many rows go where. A rank's own rows are sorted by expert.

    Attributes:
        sent, received: rows to and from each ep rank.
        runs: lengths of the runs of one expert in which rows arrive: over etp ranks, over ep ranks, over local experts;
            after each etp rank's rows a run of padding.
        by_expert: which runs, in order of local experts.
        counts: rows of each local expert; on the device where nothing is sent and the host need not know.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    runs: tuple[int, ...]
    by_expert: tuple[int, ...]
    counts: tuple[int, ...] | Tensor

    @property
    def in_order(self) -> bool:
        """Whether rows arrive sorted by expert."""
        return self.by_expert == tuple(range(len(self.runs)))

    @property
    def own(self) -> int:
        """Rows this rank has before the exchange."""
        return sum(self.sent)

    @property
    def rows(self) -> int:
        """Rows this rank receives over ep."""
        return sum(self.received)


class TokenDispatcher:
    """Sends tokens to their experts, which are split over ``ep`` (which experts) and ``etp`` (their width), by
    all-to-all over ep. On axes of size one it is a sort, and nothing is sent."""

    def __init__(self, num_experts: int, ep: Axis, etp: Axis) -> None:
        self.num_experts, self.ep, self.etp = num_experts, ep, etp

    def plan(self, counts: Tensor, rows: int | None = None) -> DispatchPlan:
        """What follows needs to know.

        Where rows are sent, or their number is not known, this is the only wait for the device.

        Args:
            counts: int64 [E], the rows that this rank has for each expert.
            rows: how many they are together.
        """
        if rows is not None and self.ep.size == self.etp.size == 1:
            return DispatchPlan((rows,), (rows,), (), (), counts)
        arriving = self._exchange_counts(counts)
        host = torch.cat([counts, arriving.flatten()]).tolist()
        mine, theirs = host[: self.num_experts], torch.tensor(host[self.num_experts :]).view(arriving.shape)
        local = self.num_experts // self.ep.size
        runs, by_expert = _runs(theirs)
        return DispatchPlan(
            sent=tuple(sum(mine[first : first + local]) for first in range(0, self.num_experts, local)),
            received=tuple(theirs[self.etp.rank].sum(dim=1).tolist()),
            runs=runs,
            by_expert=by_expert,
            counts=tuple(theirs.sum(dim=(0, 1)).tolist()),
        )

    def token_dispatch(self, copies: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """All-to-all over ep: [N, h], [N] -> [M, h], [M], the rows for this rank's experts."""
        if self.ep.size == 1:
            return copies, weights
        rows, row_weights = ExchangeRows.apply(self.ep, plan.sent, plan.received, copies, weights)
        return rows, row_weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """All-gather over etp and sort by local expert: [M, h], [M] -> [R, h], [R], ``plan.counts`` rows an expert."""
        if self.etp.size > 1:
            padding = self._padded_rows(plan) - plan.rows
            rows = gather_from_sequence_parallel(F.pad(rows, (0, 0, 0, padding)), self.etp)
            weights = gather_from_sequence_parallel(F.pad(weights, (0, padding)), self.etp)
        return sort_runs(rows, plan), sort_runs(weights, plan)

    def combine_preprocess(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """Undoes :meth:`dispatch_postprocess` for outputs that are partial sums over etp: [R, h] -> [M, h]."""
        rows = unsort_runs(rows, plan)
        if self.etp.size > 1:
            rows = reduce_scatter_to_sequence_parallel(rows, self.etp)[: plan.rows]
        return rows

    def token_combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """All-to-all over ep, back to where the tokens came from: [M, h] -> [N, h]."""
        if self.ep.size == 1:
            return rows
        (copies,) = ExchangeRows.apply(self.ep, plan.received, plan.sent, rows)
        return copies

    def _exchange_counts(self, counts: Tensor) -> Tensor:
        """Own assignments of each expert, [E] -> those that arrive: [etp, ep, E / ep]."""
        arriving = counts
        if self.ep.size > 1:
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=self.ep.group)
        arriving = gather_from_sequence_parallel(arriving, self.etp)
        return arriving.view(self.etp.size, self.ep.size, -1)

    def _padded_rows(self, plan: DispatchPlan) -> int:
        return sum(plan.runs) // self.etp.size


def _runs(arriving: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lengths, order by expert) of the runs, of the counts [etp, ep, local experts] on the host."""
    parts, sources, local = arriving.shape
    padded = max(1, int(arriving.sum(dim=(1, 2)).max())) if parts > 1 else int(arriving.sum())
    lengths: list[int] = []
    for part in arriving:
        lengths += part.flatten().tolist()
        if parts > 1:
            lengths.append(padded - int(part.sum()))
    stride = len(lengths) // parts
    order = (
        part * stride + source * local + expert
        for expert in range(local)
        for part in range(parts)
        for source in range(sources)
    )
    return tuple(lengths), tuple(order)


def sort_runs(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows as they arrive -> by local expert, without the padding."""
    if plan.in_order:
        return x
    pieces = x.split(plan.runs)
    return torch.cat([pieces[run] for run in plan.by_expert])


def unsort_runs(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Dual of :func:`sort_runs`; zeros for the padding."""
    if plan.in_order:
        return x
    pieces = dict(zip(plan.by_expert, x.split([plan.runs[run] for run in plan.by_expert]), strict=True))
    padding = (run for run in range(len(plan.runs)) if run not in pieces)
    pieces |= {run: x.new_zeros((plan.runs[run], *x.shape[1:])) for run in padding}
    return torch.cat([pieces[run] for run in range(len(plan.runs))])


class ExchangeRows(torch.autograd.Function):
    """Forward: all-to-all over dim 0 of each tensor, ``sent[r]`` rows to rank r and ``received[r]`` from it. Backward:
    the same in the other direction. One function for all tensors, so that every rank starts them in one order."""

    @staticmethod
    def forward(
        ctx: Any, axis: Axis, sent: tuple[int, ...], received: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return tuple(_all_to_all(x, axis, sent, received) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(_all_to_all(grad, ctx.axis, ctx.received, ctx.sent) for grad in grads)


def _all_to_all(x: Tensor, axis: Axis, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=axis.group)
    return out
