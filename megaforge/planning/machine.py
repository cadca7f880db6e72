"""The machine that the ranks of a run stand on, found out without starting its devices: CUDA reads settings from the
environment when it starts, and those depend on the layout."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaforge.device import host_memory_bytes
from megaforge.errors import UserError
from megaforge.planning.gpus import GPUS, Gpu
from megaforge.planning.layout import CPU_LIBRARIES
from megaforge.registry import DEVICES

# A core's rates where nothing was measured, of this order on servers; they weigh layouts against each other.
CORE_MATMUL, CORE_MEMORY, CPU_MEMORY = 50e9, 10e9, 100e9  # FLOP/s; bytes/s of one, and of all cores together
CPU_NODE, CPU_NETWORK = 2e9, 1e9  # bytes/s from rank to rank through gloo
_ASK = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
found = [torch.cuda.get_device_properties(number) for number in range(count)]
print(json.dumps([[one.name, one.total_memory] for one in found]))
"""
_SECONDS = 120.0


@dataclass(frozen=True)
class Stand:
    """Where one rank stands.

    Attributes:
        host: its machine.
        device: the name of its accelerator, or ``cpu``.
        memory: bytes of that; on a CPU those of the machine, which its ranks share.
        cores: that this process may use.
    """

    host: str
    device: str
    memory: float
    cores: int


def this_stand(requested: str, local_rank: int) -> Stand:
    """Where this process stands.

    Args:
        requested: ``--device``.

    Raises:
        UserError: there is no accelerator of its own.
    """
    if requested not in DEVICES.builtin and (kind := DEVICES.get(requested)()).count is not None:
        found: Sequence[tuple[str, float]] = [
            (requested, kind.memory(torch.device(kind.type, number))[1]) for number in range(kind.count())
        ]
    else:
        found = accelerators() if requested in ("cuda", "auto") else ()
    cores = len(os.sched_getaffinity(0))
    if not found:
        return Stand(os.uname().nodename, "cpu", host_memory_bytes(), cores)
    if local_rank >= len(found):
        raise UserError(
            f"--device {requested}: local rank {local_rank} has no device of its own ({len(found)} visible); start at "
            f"most {len(found)} processes on this node (--nproc-per-node {len(found)})"
        )
    name, memory = found[local_rank]
    return Stand(os.uname().nodename, name, memory, cores)


@functools.cache
def accelerators() -> tuple[tuple[str, float], ...]:
    """(name, bytes of memory) of each GPU that torch sees, NVIDIA's or AMD's; another process asks it."""
    try:
        asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_SECONDS)
        found = json.loads(asked.stdout or "[]")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()
    return tuple((str(name), float(memory)) for name, memory in found)


def machine_of(stands: Sequence[Stand]) -> tuple[Gpu, str | None]:
    """The device that plans of these ranks may count on, by the scarcest of them, and what to say of it.

    Rates are the datasheet's where the device is known; what is not known is weighed as an H100.
    """
    ranks = Counter(stand.host for stand in stands)
    node_size = min(ranks.values())
    kinds = sorted({stand.device for stand in stands})
    if "cpu" in kinds:
        memory = min(stand.memory / ranks[stand.host] for stand in stands)
        cores = max(1.0, min(stand.cores / ranks[stand.host] for stand in stands))
        moved = min(cores * CORE_MEMORY, CPU_MEMORY / node_size)
        rates = (cores * CORE_MATMUL, moved, CPU_NODE, CPU_NETWORK, moved)
        return Gpu("cpu", memory, *rates, node_size, CPU_LIBRARIES), None
    known = [alike(kind) for kind in kinds]
    weighed = min((gpu for gpu in known if gpu is not None), key=lambda gpu: gpu.matmul, default=GPUS["h100-80g"])
    scarcest = min(stand.memory for stand in stands)
    device = dataclasses.replace(weighed, memory=scarcest, node_size=node_size)
    if known != [weighed]:
        device = dataclasses.replace(device, name=" and ".join(kinds))
        return (
            device,
            f"{device.name}: layouts are weighed with the rates of {weighed.name}; --machine FILE gives others",
        )
    return device, None


def alike(name: str) -> Gpu | None:
    """The device of the table that a driver calls ``name``, such as ``NVIDIA H100 80GB HBM3``, or None."""
    words = name.upper().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name.partition("-")[0].upper() in words), None)
