"""``tools/plan.py detect``: what the ranks that were started stand on, measured, and a file that plans count with."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaforge.config.launcher import discover_launch
from megaforge.device import host_memory_bytes, resolve_device, synchronize
from megaforge.errors import UserError
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.distributed import initialize, shutdown
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.interconnect import device_links, fabric_ports, network_speeds
from megaforge.planning.links import Link, groups_between, groups_within, measure_link
from megaforge.planning.machine import alike, machine_of, this_stand
from megaforge.planning.plan_request import parse_detect
from megaforge.training.peak_flops import measure_matmul_peak

SLOW_NETWORK = 100e9 / 8  # bytes/s between hosts, all devices of one together; less makes training wait
_COPY = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes


@dataclass(frozen=True)
class Measured:
    """Rates of one rank's device while all ranks measure, the slowest rank's; bytes/s, FLOP/s."""

    matmul: float
    memory: float
    host: float
    inside: Link | None
    between: Link | None


def run(arguments: Sequence[str], prog: str = "plan.py detect") -> None:
    """Measures, prints what was found, and writes ``--output``. Collective over the ranks that were started.

    Raises:
        UserError: no such device, or the file cannot be written.
    """
    own, launch = parse_detect(arguments, prog), discover_launch()
    stand = this_stand(own.device, launch.local_rank)
    device = resolve_device(own.device, launch.local_rank)
    _ = initialize(device)
    ctx = ParallelContext.create(device=device)
    stands = exchange(ctx, stand)
    found = measure(ctx, [stand.host for stand in stands], own.megabytes << 20)
    described = exchange(ctx, describe_host() if launch.local_rank == 0 else None)
    hosts = {host["host"]: host for host in described if host is not None}
    planned, _ = machine_of(stands)
    gpu = device_from(planned, found, alike(stand.device))
    if ctx.is_first_rank:
        print(told(gpu, found, hosts, Counter(stand.host for stand in stands), stand.device))
        _write(own, gpu, found, hosts)
    shutdown()


def measure(ctx: ParallelContext, hosts: Sequence[str], size: int) -> Measured:
    """Measures the ranks, which stand on ``hosts``. Collective."""
    dtype = torch.float32 if ctx.device.type == "cpu" else torch.bfloat16
    matmul = measure_matmul_peak(ctx, dtype) / ctx.world.size
    count = _COPY.get(ctx.device.type, 1 << 26)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=ctx.device) for _ in range(2))
    memory = min(exchange(ctx, 2 * count / _fastest(ctx, lambda: target.copy_(source))))
    host = memory
    if ctx.device.type != "cpu":
        there = torch.zeros(count, dtype=torch.uint8, pin_memory=True)
        host = min(exchange(ctx, count / _fastest(ctx, lambda: target.copy_(there, non_blocking=True))))
    inside, between = (measure_link(ctx, groups(hosts), size) for groups in (groups_within, groups_between))
    return Measured(matmul, memory, host, inside, between)


def _fastest(ctx: ParallelContext, action: Callable[[], object]) -> float:
    """Seconds of the best of several goes."""
    best = float("inf")
    for _ in range(6):
        synchronize(ctx.device)
        started = time.perf_counter()
        action()
        synchronize(ctx.device)
        best = min(best, time.perf_counter() - started)
    return best


def device_from(planned: Gpu, found: Measured, known: Gpu | None) -> Gpu:
    """The device that plans count with: rates such that the share of them that the planner counts on
    (:class:`megaforge.planning.gpus.Efficiency`) is what was measured; products and memory of a known device by its
    datasheet.

    Args:
        planned: memory, and the rates of what was not measured.
        known: the device of the table that it is.
    """
    reached = Efficiency()
    rates: dict[str, Any] = {
        "node_bandwidth": planned.node_bandwidth if found.inside is None else found.inside.bandwidth / reached.node,
        "network_bandwidth": (
            planned.network_bandwidth if found.between is None else found.between.bandwidth / reached.network
        ),
        "host_bandwidth": found.host / reached.host,
    }
    if known is None:
        rates |= {"matmul": found.matmul, "memory_bandwidth": found.memory / reached.memory}
    return dataclasses.replace(planned, **rates)


def describe_host() -> dict[str, Any]:
    """What this rank's host says of itself (JSON)."""
    stand = this_stand("cpu", 0)
    return {
        "host": stand.host,
        "cores": stand.cores,
        "memory": host_memory_bytes(),
        "fabric": fabric_ports(),
        "network": network_speeds(),
        "links": device_links(),
    }


def told(gpu: Gpu, found: Measured, hosts: dict[str, dict[str, Any]], ranks: Counter[str], device: str) -> str:
    """What people read."""
    lines = []
    for name, host in hosts.items():
        ports = [f"{port} {rate}" for port, rate in host["fabric"].items()]
        ports += [f"{port} {speed / 1e9:g} Gbit/s" for port, speed in host["network"].items()]
        lines.append(
            f"{name}: {ranks[name]} rank{'s' * (ranks[name] > 1)} on {device}, {host['cores']} cores, "
            f"{host['memory'] / 1e9:.3g} GB of host memory"
            + (f", devices linked by {host['links']}" if host["links"] else "")
            + (f"; network: {', '.join(ports)}" if ports else "; no network port tells its speed")
        )
    lines.append(f"a rank's memory: {gpu.memory / 1e9:.4g} GB")
    lines.append(
        f"measured, a rank: products {found.matmul / 1e12:.3g} TFLOP/s, memory {found.memory / 1e9:.3g} GB/s"
        + ("" if device == "cpu" else f", host memory {found.host / 1e9:.3g} GB/s")
    )
    for words, link in (("within a host", found.inside), ("between hosts", found.between)):
        if link is not None:
            lines.append(
                f"all-reduce of {link.ranks} ranks {words}: each sends {link.bandwidth / 1e9:.3g} GB/s, "
                f"{link.latency * 1e6:.0f} us for one number"
            )
    if found.between is not None and (slow := slow_network(found.between, min(ranks.values()))):
        lines.append(slow)
    return "\n".join(lines)


def slow_network(between: Link, ranks: int) -> str | None:
    """A warning where ``ranks`` of a host together send less than 100 Gbit/s to others."""
    rate = between.bandwidth * ranks
    if rate >= SLOW_NETWORK:
        return None
    return (
        f"warning: {8 * rate / 1e9:.3g} Gbit/s between hosts is below 100: keep --tp, --cp and --ep within a host, and "
        "see that the right port is used (NCCL_SOCKET_IFNAME, NCCL_IB_HCA; GLOO_SOCKET_IFNAME)"
    )


def _write(own: argparse.Namespace, gpu: Gpu, found: Measured, hosts: dict[str, dict[str, Any]]) -> None:
    if own.output is None:
        return
    described = {
        "device": dataclasses.asdict(gpu),
        "measured": dataclasses.asdict(found),
        "hosts": list(hosts.values()),
    }
    try:
        own.output.parent.mkdir(parents=True, exist_ok=True)
        Path(own.output).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {own.output}: cannot be written ({error.strerror})") from error
    print(f"{own.output}: for --machine of a run with --layout auto, and --gpu of plan.py")
