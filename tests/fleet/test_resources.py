"""Source 002's group on resources: what the machine has, and how many models that is enough for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.fleet import machine
from megaforge.fleet.machine import Machine, free_disk, look
from megaforge.fleet.resources import Limits, ResourceManager, get_optimal_workers
from tests.fleet.fakes import manager


def test_this_machine_is_seen() -> None:
    found = ResourceManager().detect_system_resources()
    assert 1 <= found.cpu_count <= len(os.sched_getaffinity(0)) and 0 <= found.cpu_usage_percent <= 100
    assert 0 < found.available_memory_gb <= found.memory_gb and found.recommended_workers >= 1
    assert free_disk(Path("/proc/none/such")) >= 0 and free_disk(Path.cwd()) > 0


@pytest.mark.parametrize(
    ("machine", "requested", "workers", "reason"),
    [
        (manager(), 0, 1, "Invalid worker count 0: using 1"),
        (manager(), -1, 1, "Invalid worker count -1: using 1"),
        (manager(16, 16), 4, 2, "Memory warning: 4 workers need 32GB, but only 16GB available"),
        (manager(16, 32), 4, 4, "4 workers fit: 32GB free, 16 CPUs"),
        (manager(4, 512), 3, 2, "3 workers need 6 CPUs, but only 4 available"),
        (manager(1, 512), 3, 1, "3 workers need 6 CPUs, but only 1 available"),
        (manager(64, 512, load=0.81), 3, 1, "The CPUs are busy (81% > 80%): using 1"),
        (manager(64, 512, load=0.8), 3, 3, "3 workers fit: 512GB free, 64 CPUs"),
        (manager(64, 512, free=5.5), 1, 1, "Memory warning: 1 workers need 8GB, but only 5.5GB available"),
    ],
)
def test_so_many_are_validated_and_why(machine: ResourceManager, requested: int, workers: int, reason: str) -> None:
    assert machine.validate_worker_count(requested) == (workers, reason)
    assert get_optimal_workers(requested, machine) == (workers, reason)


def test_what_is_held_counts_as_free_and_limits_can_be_others() -> None:
    machine = manager(8, 32, free=8, load=0.9)
    assert machine.validate_worker_count(4, held=24e9, own_load=0.5) == (4, "4 workers fit: 32GB free, 8 CPUs")
    machine.limits = Limits(memory_per_worker_gb=0.5, cpus_per_worker=0.5, high_load=1.0, min_free_memory_gb=0)
    assert machine.validate_worker_count(16) == (16, "16 workers fit: 8GB free, 8 CPUs")
    machine.limits = Limits(memory_per_worker_gb=0.5, min_free_memory_gb=9)
    assert machine.validate_worker_count(2)[1] == "The CPUs are busy (90% > 80%): using 1"


@pytest.mark.parametrize("error", [OSError("no /proc"), UserError("no psutil"), AttributeError("cpu_count")])
def test_a_machine_that_cannot_be_seen_gets_one_worker(error: Exception) -> None:
    def fail() -> Machine:
        raise error

    assert ResourceManager(machine=fail).validate_worker_count(4) == (
        1,
        f"The machine cannot be seen ({error}): using 1",
    )


def test_monitoring_and_its_report() -> None:
    machine = manager(16, 64)
    machine.start_monitoring(interval=0.01)
    machine.start_monitoring(interval=0.01)  # it is one thread all the same
    deadline = time.monotonic() + 300
    while machine.get_current_metrics()["looks"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert machine._monitoring
    machine.stop_monitoring()
    machine.stop_monitoring()
    assert not machine._monitoring
    report = machine.generate_resource_report()
    assert report["recommendations"] == {"training_mode_suggestion": "parallel", "max_workers": 8}
    assert report["system_info"]["memory_gb"] == 64 and not any(report["constraints"].values())
    small = manager(2, 16, load=0.9).generate_resource_report()
    assert small["recommendations"]["training_mode_suggestion"] == "series"
    assert small["constraints"] == {"memory": False, "cpus": True, "load": True}
    with pytest.raises(ValueError, match="interval 0"):
        machine.start_monitoring(0)


def test_limits_of_control_groups_come_before_what_the_machine_has(tmp_path: Path) -> None:
    groups, root = tmp_path / "groups", tmp_path / "cgroup"
    whole = look(root, groups)
    inner = root / "pod/box"
    inner.mkdir(parents=True)
    groups.write_text("0::/pod/box\n")
    (root / "pod/memory.max").write_text("3000000000\n")
    (root / "pod/memory.current").write_text("1000000000\n")
    (root / "pod/memory.stat").write_text("anon 5\ninactive_file 400000000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("100000 100000\n")
    found = look(root, groups)
    assert found.memory == 3e9 and found.free_memory <= 2.4e9
    assert found.cpus == 1 <= whole.cpus
    old = tmp_path / "v1"
    (old / "memory/pod").mkdir(parents=True)
    (old / "cpu,cpuacct/pod").mkdir(parents=True)
    groups.write_text("4:memory:/pod\n3:cpu,cpuacct:/pod\n")
    (old / "memory/pod/memory.limit_in_bytes").write_text("2000000000")
    (old / "memory/pod/memory.usage_in_bytes").write_text("500000000")
    (old / "memory/pod/memory.stat").write_text("total_inactive_file 100000000\n")
    (old / "cpu/pod").mkdir(parents=True)
    (old / "cpu/pod/cpu.cfs_quota_us").write_text("50000")
    (old / "cpu/pod/cpu.cfs_period_us").write_text("100000")
    found = machine.look(old, groups)
    assert found.memory == 2e9 and found.free_memory <= 1.6e9 and found.cpus == 1
