"""The environment that GPUs are started with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaforge import device
from megaforge.device import host_memory_bytes, host_memory_share, keep_host_memory, set_gpu_environment, upload
from megaforge.errors import UserError
from megaforge.kernels import grouped_mm
from megaforge.kernels.attention import varlen
from megaforge.planning.machine import this_stand
from megaforge.registry import Registry, load_extensions
from megaforge.training import peak_flops, setup
from megaforge.training.callbacks import MetricsWriter
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset

PRETEND = Path(__file__).parent / "toys" / "pretend_device.py"
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
from megaforge import device
from megaforge.device import host_memory_bytes, host_memory_share, keep_host_memory, page_faults

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
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=True)
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
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
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


def test_memory_is_as_full_as_the_fullest_of_the_machine_and_its_containers(tmp_path: Path) -> None:
    groups, machine = tmp_path / "cgroup", tmp_path / "meminfo"
    groups.write_text("0::/job/step\n")
    machine.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  600 kB\nHugePages_Total:  0\n")
    assert host_memory_share(tmp_path, groups, machine) == pytest.approx(0.4)
    job = tmp_path / "job"
    job.mkdir()
    for name, text in (("memory.max", "1000"), ("memory.current", "950"), ("memory.stat", "anon 1\ninactive_file 100")):
        (job / name).write_text(text)
    assert host_memory_share(tmp_path, groups, machine) == pytest.approx(0.85), "files that were read can go"
    (job / "memory.stat").unlink()
    assert host_memory_share(tmp_path, groups, machine) == pytest.approx(0.4), "what cannot be read is not guessed"
    assert 0 < host_memory_share() < 1
    assert host_memory_share(tmp_path, groups, tmp_path / "none") == 0


def test_a_device_is_one_file(tmp_path: Path, restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on a device of one's own: it is chosen, waited for, measured, and its random state saved and loaded."""
    monkeypatch.setattr(peak_flops, "_measured", {})  # of other tests' runs
    toy = load_extensions((str(PRETEND),)) and next(m for n, m in sys.modules.items() if "_pretend_device_" in n)
    prefix, save = write_dataset(tmp_path / "d_text_document"), str(tmp_path / "run")
    argv = [*arguments(prefix), "--extensions", str(PRETEND), "--device", "pretend", "--save", save, "--load", save]
    place = device.resolve_device("pretend", 1)
    assert (place.type, place.index, toy.ASKED["select 1"]) == ("cpu", 1, 1)
    assert device.communication_backend(place) == "gloo"
    assert this_stand("pretend", 1).memory == 2e9 and this_stand("pretend", 0).device == "pretend"
    with pytest.raises(UserError, match=r"--device pretend: local rank 2 has no device of its own \(2 visible\)"):
        device.resolve_device("pretend", 2)
    trainer = make_trainer([*argv, "--train-iters", "1"])
    recorder = Peaks()
    trainer.add(MetricsWriter([recorder]))
    trainer.train()
    assert recorder.peaks == [123e6] and toy.ASKED["synchronize"] > 0
    make_trainer([*argv, "--train-iters", "2"]).train()
    assert toy.ASKED["random 7"] > 0, "what was saved of its generator is given back"


class Peaks:
    """A sink that keeps the memory of each step."""

    def __init__(self) -> None:
        self.peaks: list[float] = []

    def write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        self.peaks += [values["peak_memory_bytes"]] if kind == "step" else []

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def restored() -> Iterator[None]:
    """Afterwards the CPU is itself again."""
    yield
    device.resolve_device("cpu")


def test_a_package_adds_devices_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("installed", "tests.test_device:installed", "g"), EntryPoint("cpu", "nowhere:other", "g")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "g" else [])
    registry = Registry("device", {"cpu": "megaforge.device:cpu"}, entry_points="g")
    assert registry.names() == ("cpu",), "packages are not searched for nothing"
    assert registry.get("installed") is installed and registry.names() == ("cpu", "installed")
    assert registry.get("cpu") is device.cpu, "a name of ours stays ours"
    with pytest.raises(UserError, match=r"'gpu' is not a known device \(there are cpu, installed\)"):
        Registry("device", {"cpu": "megaforge.device:cpu"}, entry_points="g").check("gpu")


def installed() -> device.DeviceKind:
    return device.cpu()


def test_a_torch_module_like_that_of_cuda_makes_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    module = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 3,
        set_device=asked.append,
        synchronize=asked.append,
        max_memory_allocated=lambda place: 5,
        mem_get_info=lambda place: (1, 4),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda name: module)
    kind = device.DeviceKind.of_module("other", "othercl")
    assert (kind.backend, kind.count and kind.count()) == ("othercl", 3)
    place = torch.device("meta")
    kind.select(place), kind.synchronize(place)
    assert asked == [place, place] and (kind.peak_bytes(place), kind.memory(place)) == (5, (1, 4))
    module.is_available = lambda: False
    assert kind.count() == 0


def test_a_rocm_build_is_not_given_what_only_nvidias_gpus_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "IS_HIP", True)
    given: dict[str, str] = {}
    set_gpu_environment(one_queue=False, env=given)
    assert given == {}, "its allocator has no blocks that grow"
    for module in (varlen, grouped_mm):
        monkeypatch.setattr(module, "IS_HIP", True)
    amd = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16, shape=(1, 2, 8, 64))
    assert varlen.why_not(amd) == "is not tried on ROCm"  # type: ignore[arg-type]
