"""Process groups without peers that count what is handed to them, so that a layer's own code says what it sends."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megaforge.parallel.context import Axis, ParallelContext

Sent = dict[str, float]  # axis -> bytes; "sp": gathers and scatters along tp under sequence parallelism


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-gather or reduce-scatter of ``size`` bytes (the whole): a ring's."""
    return size * (ranks - 1) / ranks


class _Done(dist.Work):
    """A collective that is over."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class CountingGroup:
    """Rank 0 of a process group whose other ranks do not exist, as far as ``torch.distributed`` asks one: collectives
    leave their outputs as they are and add up what a ring sends, in ``sent[axis]``."""

    def __init__(self, axis: str, size: int, sent: Sent, *, gathers_as: str) -> None:
        """``gathers_as``: the axis that all-gathers and reduce-scatters count for."""
        self._axis, self._gathers_as, self._ranks, self._sent = axis, gathers_as, size, sent

    def _count(self, axis: str, size: float) -> dist.Work:
        self._sent[axis] += size
        return _Done()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._count(self._axis, 2 * ring(tensors[0].nbytes, self._ranks))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self._count(self._gathers_as, ring(output.nbytes, self._ranks))

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self._count(self._gathers_as, ring(input.nbytes, self._ranks))

    def all_to_all_single(self, output: Tensor, input: Tensor, *sizes_and_opts: Any) -> dist.Work:
        return self._count(self._axis, ring(input.nbytes, self._ranks))

    def send(self, tensors: list[Tensor], *peer_and_tag: int) -> dist.Work:
        return self._count(self._axis, tensors[0].nbytes)

    def recv(self, tensors: list[Tensor], *peer_and_tag: int) -> dist.Work:
        return _Done()

    # As torch called them before 2.13.
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single


@contextmanager
def counting_context(
    device_type: str, sequence_parallel: bool, **sizes: int
) -> Iterator[tuple[ParallelContext, defaultdict[str, float]]]:
    """The first rank of a layout with these ``sizes`` of axes, and where what it sends is counted."""
    sent: defaultdict[str, float] = defaultdict(float)
    axes: dict[str, Any] = {name: Axis(name, size) for name, size in sizes.items()}
    ranks_of: dict[Any, dict[int, int]] = distributed_c10d._world.pg_group_ranks  # read when one rank is sent to
    groups = []
    for name, size in sizes.items():
        if size > 1:
            gathers_as = "sp" if name == "tp" and sequence_parallel else name
            group: Any = CountingGroup(name, size, sent, gathers_as=gathers_as)
            groups.append(group)
            axes[name] = Axis(name, size, 0, group)
            ranks_of[group] = {rank: rank for rank in range(size)}
    try:
        yield dataclasses.replace(ParallelContext.single(device_type), **axes), sent
    finally:
        for group in groups:
            del ranks_of[group]
