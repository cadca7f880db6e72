"""How much arithmetic this machine can do at most."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megaforge.device import synchronize
from megaforge.parallel.context import ParallelContext

_BURST_SECONDS = 0.15
_EDGE = {"cpu": 1024, "cuda": 8192}


def measure_matmul_peak(ctx: ParallelContext, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products in ``dtype``, summed over all ranks, which measure at the same time so that
    ranks that share a machine's cores count them once. Collective."""
    edge = _EDGE.get(ctx.device.type, 1024)
    if ctx.device.type == "cpu" and dtype == torch.float16:
        edge //= 8  # few CPUs multiply fp16, and one large product would take seconds
    a = torch.full((edge, edge), 0.5, dtype=dtype, device=ctx.device)
    out = a @ a
    synchronize(ctx.device)
    if ctx.world.group is not None:
        dist.barrier(group=ctx.world.group)
    products, started, seconds = 0, time.perf_counter(), 0.0
    while seconds < _BURST_SECONDS:
        torch.mm(a, a, out=out)
        synchronize(ctx.device)
        products += 1
        seconds = time.perf_counter() - started
    peak = torch.tensor(2.0 * edge**3 * products / seconds, dtype=torch.float64, device=ctx.device)
    if ctx.world.group is not None:
        dist.all_reduce(peak, group=ctx.world.group)
    return float(peak.item())
