"""Experts whose outputs, or inputs, are heads: between rows of whole width and columns that are split over ranks.

An FFN's experts read and write the residual stream, so that their inner width never leaves them. Where experts stand in
front of a mixer's heads, what they write is needed by columns: each rank of tp has every token and its own heads of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.expert_dispatch import DispatchPlan, ExchangeRows, TokenDispatcher, sort_runs, unsort_runs


class ColumnDispatcher(TokenDispatcher):
    """A :class:`TokenDispatcher` for experts whose outputs or inputs are split over etp by columns."""

    def rows_from_columns(self, columns: Tensor, plan: DispatchPlan) -> Tensor:
        """What experts made of the rows that came to them, back to where the tokens came from.

        Args:
            columns: [R, ..., w / etp], sorted by expert: of each row this rank's columns.

        Returns:
            [N, ..., w].
        """
        rows = unsort_runs(columns, plan)
        if self.etp.size > 1:
            rows = columns_to_rows(rows, self.etp)[: plan.rows]
        return self.token_combine(rows, plan)

    def columns_from_rows(self, copies: Tensor, plan: DispatchPlan) -> Tensor:
        """The opposite way: [N, w], this rank's rows sorted by expert -> [R, w / etp] at the experts."""
        rows = copies
        if self.ep.size > 1:
            (rows,) = ExchangeRows.apply(self.ep, plan.sent, plan.received, copies)
        if self.etp.size > 1:
            missing = self._padded_rows(plan) - plan.rows
            rows = rows_to_columns(F.pad(rows, (0, 0, 0, missing)), self.etp)
        return sort_runs(rows, plan)


def rows_to_columns(x: Tensor, axis: Axis) -> Tensor:
    """As many rows on each rank, of whole width -> the rows of all ranks one after the other, of this rank's columns:
    [n, ..., w] -> [axis.size n, ..., w / axis.size]. The gradient goes the opposite way."""
    return x if axis.size == 1 else _Transpose.apply(x, axis, True)


def columns_to_rows(x: Tensor, axis: Axis) -> Tensor:
    """The inverse of :func:`rows_to_columns`."""
    return x if axis.size == 1 else _Transpose.apply(x, axis, False)


class _Transpose(torch.autograd.Function):
    """Forward: all-to-all between rows and columns. Backward: all-to-all in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, to_columns: bool) -> Tensor:
        ctx.axis, ctx.to_columns = axis, to_columns
        return _to_columns(x, axis) if to_columns else _to_rows(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_to_rows if ctx.to_columns else _to_columns)(grad, ctx.axis), None, None


def _to_columns(x: Tensor, axis: Axis) -> Tensor:
    pieces = x.unflatten(-1, (axis.size, -1)).movedim(-2, 0).contiguous()
    out = torch.empty_like(pieces)
    dist.all_to_all_single(out, pieces, group=axis.group)
    return out.flatten(0, 1)


def _to_rows(x: Tensor, axis: Axis) -> Tensor:
    pieces = x.unflatten(0, (axis.size, -1)).contiguous()
    out = torch.empty_like(pieces)
    dist.all_to_all_single(out, pieces, group=axis.group)
    return out.movedim(0, -2).flatten(-2)
