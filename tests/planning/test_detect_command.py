"""``tools/plan.py detect``."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.planning import detect_command
from megaforge.planning.detect_command import Measured, device_from, run, slow_network, told
from megaforge.planning.gpus import GPUS, gpu_named
from megaforge.planning.links import Link

H100 = GPUS["h100-80g"]
FOUND = Measured(7e14, 2.4e12, 4e10, Link(8, 300e9, 2e-5), Link(2, 40e9, 3e-5))
HOST = {"cores": 64, "memory": 1e12, "fabric": {"mlx5_0/1": "400 Gb/sec"}, "network": {}, "links": "NV18"}


def test_a_plan_counts_on_what_was_measured_of_links() -> None:
    known = device_from(dataclasses.replace(H100, memory=84e9), FOUND, H100)
    assert (known.memory, known.matmul, known.memory_bandwidth) == (84e9, H100.matmul, H100.memory_bandwidth)
    assert (known.node_bandwidth, known.network_bandwidth) == pytest.approx((300e9 / 0.75, 40e9 / 0.8))
    unknown = device_from(H100, dataclasses.replace(FOUND, inside=None, between=None), None)
    assert (unknown.matmul, unknown.memory_bandwidth) == pytest.approx((7e14, 2.4e12 / 0.75))
    assert (unknown.node_bandwidth, unknown.network_bandwidth) == (H100.node_bandwidth, H100.network_bandwidth)


def test_a_network_below_100_gigabits_is_warned_of() -> None:
    assert slow_network(Link(2, 1.6e9, 1e-5), 8) is None  # 102 Gbit/s of a host's eight devices
    warning = slow_network(Link(2, 1.5e9, 1e-5), 8)
    assert warning is not None and warning.startswith("warning: 96 Gbit/s between hosts is below 100: keep --tp")
    hosts, slow = {"a": HOST, "b": HOST}, dataclasses.replace(FOUND, between=Link(2, 1e9, 1e-4))
    lines = told(H100, FOUND, hosts, Counter(a=8, b=8), "NVIDIA H100").splitlines()
    assert lines[0].startswith("a: 8 ranks on NVIDIA H100, 64 cores, 1e+03 GB of host memory, devices linked by NV18")
    assert lines[-1] == "all-reduce of 2 ranks between hosts: each sends 40 GB/s, 30 us for one number"
    assert told(H100, slow, hosts, Counter(a=8, b=8), "NVIDIA H100").splitlines()[-1].startswith("warning: 64 Gbit/s")


def test_what_it_writes_is_a_device_for_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detect_command, "measure_matmul_peak", lambda ctx, dtype: 5e10)
    path = tmp_path / "new" / "machine.json"
    run(["--device", "cpu", "--output", str(path)])
    described = json.loads(path.read_text())
    device = gpu_named(str(path))
    assert dataclasses.asdict(device) == described["device"] and device.matmul == 5e10
    assert described["measured"]["memory"] > 0 and described["measured"]["inside"] is None
    text = capsys.readouterr().out
    assert "1 rank on cpu" in text and f"{path}: for --machine" in text
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file/machine.json: cannot be written"):
        run(["--device", "cpu", "--output", str(tmp_path / "file" / "machine.json")])
