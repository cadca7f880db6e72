"""Ranks doing a thing together: either it worked everywhere, or every rank raises the same error.

A rank that raises alone leaves the others waiting in the next collective until the timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megaforge.errors import CheckpointError, UserError
from megaforge.parallel.context import ParallelContext

T = TypeVar("T")
_Outcome = tuple[T | None, str | None, bool]  # value, error text, whether the user can fix the error


def exchange(ctx: ParallelContext, value: T) -> list[T]:
    """Every rank's ``value``, by rank."""
    if ctx.control is None:
        return [value]
    gathered: list[T] = [value] * ctx.world.size
    dist.all_gather_object(gathered, value, group=ctx.control)
    return gathered


def reduced(ctx: ParallelContext, value: int, operation: dist.ReduceOp.RedOpType) -> int:
    """The sum, least or most of every rank's ``value``, in host memory."""
    found = torch.tensor([int(value)])
    if ctx.control is not None:
        dist.all_reduce(found, operation, group=ctx.control)
    return int(found)


def tell_stages(ctx: ParallelContext, x: torch.Tensor, last_rank: int) -> None:
    """What the ranks of the last stage, ``last_rank`` of pp, have in ``x`` the others get, in place; and those of tp
    the very same bits."""
    if ctx.pp.group is not None:
        dist.broadcast(x, group=ctx.pp.group, group_src=last_rank)
    if ctx.tp.group is not None:
        dist.broadcast(x, group=ctx.tp.group, group_src=0)


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return action(), None, True
    except (UserError, OSError) as error:
        return None, str(error), True
    except Exception as error:  # reaches every rank as a RuntimeError below; swallowing it would hang the others
        return None, f"{type(error).__name__}: {error}", False


def _raise(text: str, users: bool) -> None:
    raise CheckpointError(text) if users else RuntimeError(text)


def together(ctx: ParallelContext, action: Callable[[], T]) -> T:
    """Runs ``action`` on every rank and returns this rank's result once all have one.

    Raises:
        CheckpointError: it failed on some rank with a UserError or OSError; the text names the ranks.
        RuntimeError: it failed on some rank with anything else.
    """
    value, text, users = _attempt(action)
    complaints = exchange(ctx, None if text is None else (text, users))  # values stay where they are
    failures = {rank: complaint for rank, complaint in enumerate(complaints) if complaint is not None}
    if failures:
        described = describe_failures({rank: text for rank, (text, _) in failures.items()})
        _raise(described, all(users for _, users in failures.values()))
    return cast(T, value)  # which is there: nothing failed


def from_first_rank(ctx: ParallelContext, action: Callable[[], T]) -> T:
    """Runs ``action`` on rank 0 alone and returns its result on every rank.

    Raises:
        CheckpointError: it raised a UserError or OSError.
        RuntimeError: it raised anything else.
    """
    outcome: list[_Outcome[T]] = [_attempt(action) if ctx.is_first_rank or ctx.control is None else (None, None, True)]
    if ctx.control is not None:
        dist.broadcast_object_list(outcome, src=0, group=ctx.control)
    value, text, users = outcome[0]
    if text is not None:
        _raise(text, users)
    return cast(T, value)  # which is there: nothing failed


def describe_failures(failures: dict[int, str]) -> str:
    """``rank 3: TEXT; rank 5: TEXT``, or the text alone when it is the same everywhere."""
    if len(set(failures.values())) == 1:
        ranks = "" if 0 in failures else f"rank {min(failures)}: "
        return ranks + next(iter(failures.values()))
    return "; ".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
