"""How a bucket of gradients is summed over its replicas: plainly, rounded to 16 bit, or as low-rank factors.

Anything but :class:`AllReduceHook` departs from the promise that the layout changes nothing but speed: what is lost
depends on which rank computed what. Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv
1901.09847) keeps what this step lost and adds it to the next, so that losses do not pile up in one direction.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.run_config import ParallelConfig
from megaforge.parallel.buckets import Bucket
from megaforge.parallel.collectives import reduce_scatter_single
from megaforge.parallel.param_spec import spec_of

Finish = Callable[[], None]


def make_comm_hook(config: ParallelConfig) -> CommHook:
    """What ``--grad-reduce-in-bf16`` and ``--grad-compression`` ask for."""
    if config.grad_compression == "powersgd":
        return PowerSGD(config.grad_compression_rank)
    if config.grad_compression == "bf16":
        return AllReduceHook(torch.bfloat16, error_feedback=True)
    return AllReduceHook(torch.bfloat16 if config.grad_reduce_in_bf16 else None)


class CommHook(Protocol):
    """A way to sum over ``bucket.replicas``."""

    def start(self, bucket: Bucket, full: Tensor, *, scatter: bool) -> Finish:
        """Begins to sum ``full`` [bucket.size] over the replicas.

        After the returned function has run, ``full`` holds the sum; with ``scatter`` at least in this rank's own slice.
        """

    def forget(self) -> None:
        """Forgets what earlier gradients have left."""


def _nothing_to_do() -> None:
    """The sum over one replica."""


def _sum(bucket: Bucket, payload: Tensor, scatter: bool) -> dist.Work:
    """Sums ``payload`` in place, or only this rank's slice of it."""
    group = bucket.replicas.group
    work = (
        reduce_scatter_single(bucket.own_slice(payload), payload, group=group, async_op=True)
        if scatter
        else dist.all_reduce(payload, group=group, async_op=True)
    )
    if work is None:
        raise RuntimeError(f"this rank is not in the group of {bucket.replicas.name}")
    return work


class AllReduceHook:
    """The sum, in the gradients' own type or in ``dtype``.

    Args:
        dtype: what is sent and summed, bfloat16 or None.
        error_feedback: whether the rounding error of this rank's part is kept for the next step.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, error_feedback: bool = False) -> None:
        self.dtype = dtype
        self.error_feedback = error_feedback
        self._errors: dict[int, Tensor] = {}  # by bucket, [size] in the gradients' type

    def forget(self) -> None:
        self._errors.clear()

    def start(self, bucket: Bucket, full: Tensor, *, scatter: bool) -> Finish:
        if bucket.replicas.group is None:
            return _nothing_to_do
        payload = full if self.dtype is None else self._rounded(bucket, full)
        work = _sum(bucket, payload, scatter)

        def finish() -> None:
            work.wait()
            if payload is not full and scatter:
                bucket.own_slice(full).copy_(bucket.own_slice(payload))
            elif payload is not full:
                full.copy_(payload)

        return finish

    def _rounded(self, bucket: Bucket, full: Tensor) -> Tensor:
        if not self.error_feedback:
            return full.to(self.dtype)
        error = self._errors.setdefault(id(bucket), torch.zeros_like(full))
        wanted = error.add_(full)
        payload = wanted.to(self.dtype)
        error.sub_(payload)
        return payload


@dataclass
class _LowRank:
    """A stack of matrices [k, m, n] of one parameter: what earlier steps left out, and their right factor [k, n, r]."""

    error: Tensor
    right: Tensor


class PowerSGD:
    """One step of power iteration a step (Vogels et al., arXiv 1905.13727), warm-started with the last one's factor.

    Each matrix of a parameter (each expert of a stack) is sent as two factors of rank ``rank``; vectors, and matrices
    that factors would not make smaller, are sent as they are. Residuals and factors are in the gradients' type
    (fp32). Unlike in the paper gradients are sums over replicas, so the residual is against the sum's even share.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._states: dict[int, _LowRank] = {}  # by parameter

    def forget(self) -> None:
        self._states.clear()

    def compresses(self, parameter: nn.Parameter) -> bool:
        """Whether ``parameter`` is sent as factors."""
        if spec_of(parameter).role not in ("matrix", "lookup"):
            return False
        rows, columns = parameter.shape[-2:]
        return self.rank * (rows + columns) < rows * columns

    @torch.no_grad()
    def start(self, bucket: Bucket, full: Tensor, *, scatter: bool) -> Finish:
        if bucket.replicas.group is None:
            return _nothing_to_do
        matrices, states, rest = [], [], []
        for parameter, view in zip(bucket.parameters, bucket.views(full), strict=True):
            if self.compresses(parameter):
                matrix = view.view(-1, *view.shape[-2:])
                state = self._state(parameter, matrix)
                matrix.add_(state.error)
                matrices.append(matrix)
                states.append(state)
            else:
                rest.append(view)
        lefts = [matrix @ state.right for matrix, state in zip(matrices, states, strict=True)]
        payload = torch.cat([part.flatten() for part in (*lefts, *rest)])
        work = _sum(bucket, payload, scatter=False)
        return partial(self._finish, bucket, work, payload, matrices, states, rest)

    def _state(self, parameter: nn.Parameter, matrix: Tensor) -> _LowRank:
        state = self._states.get(id(parameter))
        if state is None:
            # Seeded by the name: replicas must start from the same factor.
            generator = torch.Generator().manual_seed(zlib.crc32(spec_of(parameter).name.encode()))
            shape = (matrix.shape[0], matrix.shape[2], self.rank)
            right = torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix)
            state = self._states[id(parameter)] = _LowRank(torch.zeros_like(matrix), right)
        return state

    @torch.no_grad()
    def _finish(
        self,
        bucket: Bucket,
        work: dist.Work,
        payload: Tensor,
        matrices: list[Tensor],
        states: list[_LowRank],
        rest: list[Tensor],
    ) -> None:
        work.wait()
        sizes = [matrix.shape[0] * matrix.shape[1] * self.rank for matrix in matrices]
        summed = payload.split([*sizes, *(view.numel() for view in rest)])
        for view, total in zip(rest, summed[len(matrices) :], strict=True):
            view.copy_(total.view_as(view))
        if not matrices:
            return
        lefts = [
            torch.linalg.qr(total.view(matrix.shape[0], matrix.shape[1], self.rank))[0]
            for matrix, total in zip(matrices, summed, strict=False)
        ]
        rights = [matrix.mT @ left for matrix, left in zip(matrices, lefts, strict=True)]
        joined = torch.cat([right.flatten() for right in rights])
        dist.all_reduce(joined, group=bucket.replicas.group)
        totals = joined.split([right.numel() for right in rights])
        for matrix, state, left, total in zip(matrices, states, lefts, totals, strict=True):
            state.right = total.view_as(state.right)
            estimate = left @ state.right.mT
            state.error = matrix - estimate / bucket.replicas.size
            matrix.copy_(estimate)
