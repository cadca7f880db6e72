"""How fast ranks send to each other, measured: within a host and between hosts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaforge.device import synchronize
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext

REPEATS = 5
SMALL = 10  # tiny reductions in a row, for their latency


@dataclass(frozen=True)
class Link:
    """What groups of ranks reach that all communicate at once; the slowest of them.

    Attributes:
        ranks: of a group.
        bandwidth: bytes/s that each rank sends in an all-reduce, in one direction.
        latency: seconds of an all-reduce of one number.
    """

    ranks: int
    bandwidth: float
    latency: float


def groups_within(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of each host, of ranks that stand on ``hosts``; of those with several."""
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return [ranks for ranks in members.values() if len(ranks) > 1]


def groups_between(hosts: Sequence[str]) -> list[list[int]]:
    """The first rank of every host, the second of every host, and so on, as far as all hosts have one: every device
    of a host sends at once, as data parallelism does."""
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return [] if len(members) == 1 else [list(ranks) for ranks in zip(*members.values(), strict=False)]


def measure_link(ctx: ParallelContext, groups: Sequence[Sequence[int]], size: int) -> Link | None:
    """What ``groups`` of ranks reach, all of them at the same time; None where there are none. Collective.

    Args:
        size: bytes of the tensor that each group sums.
    """
    if not groups:
        return None
    made = [dist.new_group(list(ranks)) for ranks in groups]  # every rank makes all of them, in one order
    own = next((group for group, ranks in zip(made, groups, strict=True) if ctx.world.rank in ranks), None)
    count = max(map(len, groups))
    large, small = (torch.zeros(elements, device=ctx.device) for elements in (max(1, size // 4), 1))
    seconds = _slowest(ctx, own, large, 1)
    latency = _slowest(ctx, own, small, SMALL)
    for group in made:
        dist.destroy_process_group(group)
    return Link(count, 2 * (count - 1) / count * large.nbytes / seconds, latency)


def _slowest(ctx: ParallelContext, group: dist.ProcessGroup | None, tensor: torch.Tensor, times: int) -> float:
    """Seconds of an all-reduce, of the slowest group: the median of several goes, each begun together."""
    taken = []
    for _ in range(REPEATS + 1):
        synchronize(ctx.device)
        if ctx.control is not None:
            dist.barrier(group=ctx.control)
        started = time.perf_counter()
        if group is not None:
            for _ in range(times):
                dist.all_reduce(tensor, group=group)
        synchronize(ctx.device)
        taken.append((time.perf_counter() - started) / times)
    return max(exchange(ctx, 0.0 if group is None else statistics.median(taken[1:])))  # the first makes connections
