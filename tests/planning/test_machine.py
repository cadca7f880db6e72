"""What the ranks of a run stand on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from megaforge.device import host_memory_bytes
from megaforge.errors import UserError
from megaforge.planning import machine
from megaforge.planning.gpus import GPUS
from megaforge.planning.machine import Stand, machine_of, this_stand

H100 = "NVIDIA H100 80GB HBM3"


def test_gpus_count_with_the_datasheets_rates_and_the_scarcest_memory() -> None:
    stands = [Stand(host, H100, memory, 8) for host, memory in (("a", 85e9), ("a", 84e9), ("b", 85e9))]
    device, note = machine_of([*stands, Stand("b", H100, 85e9, 8)])
    assert device == dataclasses.replace(GPUS["h100-80g"], memory=84e9, node_size=2) and note is None
    mixed, note = machine_of([stands[0], Stand("a", "NVIDIA A100-SXM4-40GB", 42e9, 8)])
    assert (mixed.matmul, mixed.memory) == (GPUS["a100-80g"].matmul, 42e9)
    assert note is not None and note.endswith("the rates of a100-80g; --machine FILE gives others")
    amd, note = machine_of([Stand("a", "AMD Instinct MI300X", 206e9, 8)])
    assert amd == dataclasses.replace(GPUS["mi300x-192g"], memory=206e9, node_size=1) and note is None
    other, note = machine_of([Stand("a", "Some GPU", 10e9, 8)])
    assert (other.name, other.memory, other.matmul) == ("Some GPU", 10e9, GPUS["h100-80g"].matmul)
    assert note is not None and "rates of h100-80g" in note


def test_cpu_ranks_share_the_memory_of_their_machine() -> None:
    device, note = machine_of([Stand("a", "cpu", 64e9, 4), Stand("a", "cpu", 64e9, 4), Stand("b", "cpu", 48e9, 4)])
    assert (device.name, device.memory, device.node_size, note) == ("cpu", 32e9, 1, None)
    assert device.libraries < 1e9, "there is no CUDA to make room for"
    assert machine_of([Stand("a", "cpu", 64e9, 4)])[0].matmul == 2 * device.matmul


def test_a_rank_has_a_device_of_its_own_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: ((H100, 85e9), (H100, 84e9)))
    assert this_stand("auto", 1).memory == 84e9
    assert this_stand("cpu", 1) == dataclasses.replace(this_stand("auto", 1), device="cpu", memory=host_memory_bytes())
    with pytest.raises(UserError, match=r"--device cuda: local rank 2 has no device of its own \(2 visible\)"):
        this_stand("cuda", 2)


def test_another_process_asks_for_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(text: str) -> None:
        machine.accelerators.cache_clear()
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))

    answer(json.dumps([[H100, 85_000_000_000]]))
    assert machine.accelerators() == ((H100, 85e9),)
    answer("no torch")
    assert machine.accelerators() == ()

    def hangs(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    machine.accelerators.cache_clear()
    monkeypatch.setattr(subprocess, "run", hangs)
    assert machine.accelerators() == ()
    machine.accelerators.cache_clear()
