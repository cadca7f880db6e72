"""Tokens to the ranks of their experts and back: copy, exchange over ep, gather over etp, and the same backwards.

The six steps are those of Megatron-LM's token dispatchers (github.com/NVIDIA/Megatron-LM, core/transformer/moe). What
one step learns and a later one needs is in a :class:`DispatchPlan` that the caller carries, so any number of
micro-batches may be under way, and a recomputed forward pass makes its own.
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
    """Where each of T * k assignments goes when they are sorted by expert; equal experts keep the order of tokens.

    Attributes:
        topk: k, assignments a token.
        token: int64 [N], the token of each sorted assignment; N < T * k where some are dropped.
        order: int64 [N], the assignment t * k + j at each sorted place.
        position: int64 [T * k], its inverse; N for a dropped assignment.
        sent, received: rows to and from each ep rank.
        runs: lengths of the runs of one expert in which rows arrive: over etp ranks, over ep ranks, over local experts;
            after each etp rank's rows a run of padding.
        by_expert: which runs, in order of local experts.
        counts: rows of each local expert.
    """

    topk: int
    token: Tensor
    order: Tensor
    position: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    runs: tuple[int, ...]
    by_expert: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def drops(self) -> bool:
        return self.order.numel() < self.position.numel()

    @property
    def in_order(self) -> bool:
        """Whether rows arrive sorted by expert."""
        return self.by_expert == tuple(range(len(self.runs)))

    @property
    def rows(self) -> int:
        """Rows this rank receives over ep."""
        return sum(self.received)


class TokenDispatcher:
    """Sends tokens to their experts, which are split over ``ep`` (which experts) and ``etp`` (their width), by
    all-to-all over ep. On axes of size one it is a sort, and nothing is sent."""

    def __init__(self, num_experts: int, ep: Axis, etp: Axis) -> None:
        self.num_experts, self.ep, self.etp = num_experts, ep, etp

    def dispatch_preprocess(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, DispatchPlan]:
        """A copy of each token for each of its experts, sorted by expert.

        Args:
            tokens: [T, h].
            weights: [T, k], of each assignment.
            experts: int64 [T, k].
            kept: bool [T, k], the assignments that are not dropped; None: all.

        Returns:
            [N, h], [N] and the plan. The only wait for the device is here: for the numbers of rows.
        """
        plan = self._plan(experts, kept)
        return _Copies.apply(tokens, plan), weights.flatten().index_select(0, plan.order), plan

    def token_dispatch(self, copies: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """All-to-all over ep: [N, h], [N] -> [M, h], [M], the rows for this rank's experts."""
        if self.ep.size == 1:
            return copies, weights
        rows, row_weights = _ExchangeRows.apply(self.ep, plan.sent, plan.received, copies, weights)
        return rows, row_weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """All-gather over etp and sort by local expert: [M, h], [M] -> [R, h], [R], ``plan.counts`` rows an expert."""
        if self.etp.size > 1:
            padding = self._padded_rows(plan) - plan.rows
            rows = gather_from_sequence_parallel(F.pad(rows, (0, 0, 0, padding)), self.etp)
            weights = gather_from_sequence_parallel(F.pad(weights, (0, padding)), self.etp)
        return _sort_runs(rows, plan), _sort_runs(weights, plan)

    def combine_preprocess(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """Undoes :meth:`dispatch_postprocess` for outputs that are partial sums over etp: [R, h] -> [M, h]."""
        rows = _unsort_runs(rows, plan)
        if self.etp.size > 1:
            rows = reduce_scatter_to_sequence_parallel(rows, self.etp)[: plan.rows]
        return rows

    def token_combine(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """All-to-all over ep, back to where the tokens came from: [M, h] -> [N, h]."""
        if self.ep.size == 1:
            return rows
        (copies,) = _ExchangeRows.apply(self.ep, plan.received, plan.sent, rows)
        return copies

    def combine_postprocess(self, copies: Tensor, plan: DispatchPlan) -> Tensor:
        """The sum of each token's copies: [N, h] -> [T, h]; zero for a token all of whose assignments are dropped."""
        return _SumOfCopies.apply(copies, plan)

    def _plan(self, experts: Tensor, kept: Tensor | None) -> DispatchPlan:
        # Dropped assignments go behind the last expert's.
        flat = (experts if kept is None else torch.where(kept, experts, self.num_experts)).flatten()
        in_order, order = flat.sort(stable=True)
        bounds = torch.searchsorted(in_order, torch.arange(self.num_experts + 1, device=flat.device))
        counts = bounds.diff()
        arriving = self._exchange_counts(counts)
        host = torch.cat([counts, arriving.flatten()]).tolist()  # the one wait for the device
        mine, theirs = host[: self.num_experts], torch.tensor(host[self.num_experts :]).view(arriving.shape)
        total = sum(mine)
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        order = order[:total]
        local = self.num_experts // self.ep.size
        runs, by_expert = _runs(theirs)
        return DispatchPlan(
            topk=experts.shape[1],
            token=order // experts.shape[1],
            order=order,
            position=position if kept is None else position.clamp(max=total),
            sent=tuple(sum(mine[first : first + local]) for first in range(0, self.num_experts, local)),
            received=tuple(theirs[self.etp.rank].sum(dim=1).tolist()),
            runs=runs,
            by_expert=by_expert,
            counts=tuple(theirs.sum(dim=(0, 1)).tolist()),
        )

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


def _sort_runs(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows as they arrive -> by local expert, without the padding."""
    if plan.in_order:
        return x
    pieces = x.split(plan.runs)
    return torch.cat([pieces[run] for run in plan.by_expert])


def _unsort_runs(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Dual of :func:`_sort_runs`; zeros for the padding."""
    if plan.in_order:
        return x
    pieces = dict(zip(plan.by_expert, x.split([plan.runs[run] for run in plan.by_expert]), strict=True))
    empty = (x.new_zeros((length, *x.shape[1:])) for length in plan.runs)
    return torch.cat([pieces.get(run, padding) for run, padding in enumerate(empty)])


class _Copies(torch.autograd.Function):
    """Forward: a copy of each token for each of its experts, sorted by expert. Backward: the sum of a token's copies,
    by gathering, so that it needs no atomic addition and is the same every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_copies(grad, ctx.plan), None


class _SumOfCopies(torch.autograd.Function):
    """Forward: the sum of each token's sorted copies. Backward: a copy of the gradient for each. Dual of _Copies."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _sum_copies(y, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.token), None


def _sum_copies(y: Tensor, plan: DispatchPlan) -> Tensor:
    if plan.drops:
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])  # what a dropped assignment gives
    tokens = plan.position.numel() // plan.topk
    return y.index_select(0, plan.position).view(tokens, plan.topk, y.shape[1]).sum(dim=1)


class _ExchangeRows(torch.autograd.Function):
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
