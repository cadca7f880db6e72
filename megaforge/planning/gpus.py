"""The accelerators the planner knows, and what share of their datasheet it counts on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.errors import UserError
from megaforge.json_text import parse_json


@dataclass(frozen=True)
class Gpu:
    """One accelerator in its usual server, by its vendor's datasheet; bandwidths are of one GPU in one direction.

    Attributes:
        memory: bytes, decimal, as sold (what a driver reports is a little more).
        matmul: dense 16-bit tensor-core FLOP/s, without sparsity.
        memory_bandwidth: bytes/s.
        node_bandwidth: bytes/s to the other GPUs of the server (NVLink).
        network_bandwidth: bytes/s to other servers.
        host_bandwidth: bytes/s to host memory (PCIe x16).
        node_size: GPUs of a server.
        libraries: bytes of the device's context and libraries, assumed: they differ by driver and number of groups.
    """

    name: str
    memory: float
    matmul: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    node_size: int = 8
    libraries: float = 2e9


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80g", 80e9, 312e12, 2.039e12, 300e9, 25e9, 32e9),  # SXM, DGX A100: 8 x 200 Gbit/s, PCIe 4
        Gpu("h100-80g", 80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9),  # SXM, DGX H100: 8 x 400 Gbit/s, PCIe 5
        Gpu("h200-141g", 141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        Gpu("mi300x-192g", 192e9, 1307e12, 5.3e12, 448e9, 50e9, 64e9),  # OAM, 7 Infinity Fabric links, 8 x 400 Gbit/s
        Gpu("b200-180g", 180e9, 2250e12, 7.7e12, 900e9, 50e9, 64e9),  # DGX B200: 8 x 400 Gbit/s
    )
}

ROOM = 0.9  # of a GPU's memory: what fragments and other programs leave


def verdict(share: float) -> str:
    """Whether a rank that needs this share of a GPU's memory has room there."""
    return "fits" if share <= ROOM else "is tight" if share <= 1 else "DOES NOT FIT"


def gpu_named(name: str, flag: str = "--gpu") -> Gpu:
    """The device that ``flag`` names: one of the table, or a JSON file.

    Raises:
        UserError: it is not in the table, or the file does not describe a device.
    """
    if name in GPUS:
        return GPUS[name]
    if not name.endswith(".json"):
        raise UserError(f"{flag} {name} is unknown; choose {', '.join(GPUS)}, or a .json file of tools/plan.py detect")
    try:
        return gpu_of(parse_json(Path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{flag} {name}: {error} (docs/planner.md says what it holds)") from error


def gpu_of(described: object) -> Gpu:
    """The device of the ``device`` object of a description; further keys are for people.

    Raises:
        UserError: a field is missing or no positive number.
    """
    device = described.get("device") if isinstance(described, dict) else None
    if not isinstance(device, dict) or not isinstance(device.get("name"), str):
        raise UserError("it has no object 'device' with a name")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Gpu):
        value = device.get(field.name, field.default if field.name == "libraries" else None)
        if field.name == "name":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise UserError(f"device.{field.name} is not a positive number")
        values[field.name] = value
    return Gpu(device["name"], **{**values, "node_size": int(values["node_size"])})


@dataclass(frozen=True)
class Efficiency:
    """Shares of the datasheet that a well-tuned run reaches; every prediction of time rests on them.

    Attributes:
        matmul: of dense products (MFU reported for dense models of this size on H100 is 40-50 % with everything else
            included: Megatron-LM's README).
        grouped_matmul: of experts' products, whose matrices are smaller.
        attention: of the attention kernel (FlashAttention, backward pass included).
        wkv: of a fused, chunked WKV-7 kernel counted in recurrent FLOPs: 8 ms forward and backward for 4,096 channels
            and 32,768 tokens on H100 (github.com/johanwind/wind_rwkv).
        memory: of memory bandwidth, in elementwise work.
        node: of the bandwidth within a server.
        network: of the bandwidth between servers.
        host: of the bandwidth to host memory, from and to pinned memory.
    """

    matmul: float = 0.65
    grouped_matmul: float = 0.50
    attention: float = 0.45
    wkv: float = 0.035
    memory: float = 0.75
    node: float = 0.75
    network: float = 0.80
    host: float = 0.80
