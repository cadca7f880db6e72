"""How much arithmetic this machine can do at most."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megaforge.device import synchronize
from megaforge.parallel.context import ParallelContext

_EDGE = {"cpu": 1024, "cuda": 8192}
# Bursts end when the best has stood for a while (a machine shared with others is fast only now and then, a cold one
# gets faster), or when the time is up.
_BURST_SECONDS = 0.04
_MOST_SECONDS = 1.0
_STANDS = 5
_NEW_BEST = 1.01
_measured: dict[tuple[str, torch.dtype, int], float] = {}  # by kind of device, type and number of ranks


def measure_matmul_peak(ctx: ParallelContext, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products in ``dtype``, summed over all ranks: the best of several short bursts, measured
    once in a process.

    The ranks measure at the same time, so that those that share a machine's cores count them once. Collective.
    """
    key = ctx.device.type, dtype, ctx.world.size
    if key not in _measured:
        _measured[key] = _measure(ctx, dtype)
    return _measured[key]


def _measure(ctx: ParallelContext, dtype: torch.dtype) -> float:
    edge = _EDGE.get(ctx.device.type, 1024)
    if ctx.device.type == "cpu" and dtype == torch.float16:
        edge //= 8  # few CPUs multiply fp16, and one large product would take seconds
    a = torch.full((edge, edge), 0.5, dtype=dtype, device=ctx.device)
    out = a @ a
    best, stood, spent = 0.0, 0, 0.0
    while stood < _STANDS and spent < _MOST_SECONDS:
        rate, seconds = _burst(ctx, a, out)
        # Every rank sees the same sums, so all stop together.
        sums = torch.tensor([rate, seconds], dtype=torch.float64)
        if ctx.control is not None:
            dist.all_reduce(sums, group=ctx.control)
        rate, seconds = sums.tolist()
        spent += seconds / ctx.world.size
        stood = 0 if rate > _NEW_BEST * best else stood + 1
        best = max(best, rate)
    return best


def _burst(ctx: ParallelContext, a: torch.Tensor, out: torch.Tensor) -> tuple[float, float]:
    """(FLOP/s, seconds) of a few products on this rank, begun together with the others."""
    synchronize(ctx.device)
    if ctx.control is not None:
        dist.barrier(group=ctx.control)
    products, seconds, started = 0, 0.0, time.perf_counter()
    while seconds < _BURST_SECONDS:
        torch.mm(a, a, out=out)
        synchronize(ctx.device)
        products += 1
        seconds = time.perf_counter() - started
    return 2.0 * a.shape[0] ** 3 * products / seconds, seconds
