"""The environment that GPUs are started with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaforge.device import host_memory_bytes, keep_host_memory, set_gpu_environment, upload
from megaforge.training import setup
from tests.training.tiny import arguments, make_config

GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "one_queue", "expected"),
    [
        ({}, False, GROWING),
        ({}, True, GROWING | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
            True,
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
            False,
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        ),
    ],
)
def test_what_the_user_set_stays(given: dict[str, str], one_queue: bool, expected: dict[str, str]) -> None:
    set_gpu_environment(one_queue=one_queue, env=given)
    assert given == expected


@pytest.mark.parametrize(
    ("flags", "queue"),
    [
        (("--device", "auto", "--tp", "2"), [True]),
        (("--device", "auto"), [False]),
        (("--device", "cuda", "--tp", "2", "--no-overlap-tp-comm"), [False]),
        (("--device", "cpu", "--tp", "2"), []),
    ],
)
def test_it_is_set_before_a_device_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], queue: list[bool]
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(setup, "set_gpu_environment", lambda one_queue: calls.append(one_queue))
    monkeypatch.setattr(setup, "resolve_device", lambda *a: calls.append("device") or torch.device("cpu"))
    for name in ("set_numerics", "initialize", "make_context"):
        monkeypatch.setattr(setup, name, lambda *a: None)
    setup.initialize_distributed(make_config(arguments("corpus", *flags)))
    assert calls == [*queue, "device"]


def test_upload_to_where_it_is_copies_nothing() -> None:
    x = torch.ones(2)
    assert upload(x, torch.device("cpu")) is x


@pytest.mark.parametrize(
    ("device", "ranks", "cores", "said"),
    [
        ("cuda", 8, 64, None),
        ("cuda", 8, 16, None),
        ("cuda", 8, 1, "8 ranks on a GPU may use 1 core of"),  # a Slurm step without --cpus-per-task
        ("cuda", 1, 1, "1 rank on a GPU may use 1 core of"),
        ("cpu", 8, 2, None),
    ],
)
def test_ranks_without_cores_are_told(device: str, ranks: int, cores: int, said: str | None) -> None:
    note = setup.few_cores(torch.device(device), ranks, cores)
    assert note is None if said is None else note is not None and said in note and "SRUN_CPUS_PER_TASK" in note


_FAULTS = """
import json, torch
from megaforge.device import host_memory_bytes, keep_host_memory, page_faults

def faults():
    seen = [page_faults()]
    for _ in range(40):
        torch.empty(10 << 20).zero_()  # 40 MiB
        seen.append(page_faults())
    return seen[-1] - seen[36]

print(json.dumps([faults(), keep_host_memory(), faults()]))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library")
def test_freed_host_memory_is_kept_for_the_next_tensor() -> None:
    """glibc gives blocks of this size back to the kernel; in a process of its own, for it stays so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", _FAULTS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=True)
    before, kept, after = json.loads(done.stdout)
    assert kept and before > 1000 and after < before / 10


_TRIMMED = """
import torch
from megaforge.device import give_back_host_memory, keep_host_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

keep_host_memory()
freed = [torch.ones(2 << 20) for _ in range(20)]  # 160 MiB
del freed
before = resident()
assert give_back_host_memory()
print(before - resident())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library")
def test_kept_host_memory_can_be_given_back() -> None:
    words = [sys.executable, "-c", _TRIMMED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) > 120 << 10, "kilobytes"


@pytest.mark.parametrize("given", [
    {"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
])  # fmt: skip
def test_settings_of_malloc_stay(given: dict[str, str]) -> None:
    assert not keep_host_memory(given)


def test_the_smallest_limit_of_a_process_and_its_containers_counts(tmp_path: Path) -> None:
    machine = host_memory_bytes(tmp_path, tmp_path / "none")
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "job" / "step").mkdir(parents=True)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/job/step\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    assert host_memory_bytes(tmp_path, groups) == machine
    (tmp_path / "job" / "memory.max").write_text("123456\n")
    assert host_memory_bytes(tmp_path, groups) == 123456
    (tmp_path / "memory" / "box").mkdir(parents=True)  # version 1, whose limit of no limit is beyond any machine
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    groups.write_text("5:cpu,memory:/box\n3:pids:/box\n")
    assert host_memory_bytes(tmp_path, groups) == machine
    (tmp_path / "memory" / "box" / "memory.limit_in_bytes").write_text("4096\n")
    assert host_memory_bytes(tmp_path, groups) == 4096
