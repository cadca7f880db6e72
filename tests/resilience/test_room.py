"""How much may be taken of a machine's memory."""

from __future__ import annotations

import os

import pytest

from megaforge.resilience import room


def test_no_more_than_the_file_system_and_the_memory_have_left(tmp_path, monkeypatch: pytest.MonkeyPatch):
    held = os.statvfs(tmp_path)
    assert room.free_bytes(tmp_path) <= held.f_bavail * held.f_frsize
    monkeypatch.setattr(room, "in_memory", lambda folder: True)
    monkeypatch.setattr(room, "_free_memory", lambda: [5e6, 1e5])
    assert room.free_bytes(tmp_path) == 10**5
    monkeypatch.setattr(room, "_free_memory", lambda: [-1.0])
    assert room.free_bytes(tmp_path) == 0


def test_what_the_control_group_may_still_take(tmp_path, monkeypatch: pytest.MonkeyPatch):
    texts = {
        "/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 500 kB\nHugePages_Total: 0\n",
        "/sys/fs/cgroup/memory.max": "400000\n",
        "/sys/fs/cgroup/memory.current": "300000\n",
        "/sys/fs/cgroup/memory.stat": "anon 7\ninactive_file 50000\n",
    }
    monkeypatch.setattr(room.Path, "read_text", lambda self, **how: texts[str(self)])
    assert room._free_memory() == [1024 * 450, 380_000 - 300_000 + 50_000]
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert room._free_memory() == [1024 * 450]


def test_where_memory_is_a_folder(tmp_path):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("this machine has no shared memory")
    assert room.in_memory("/dev/shm") and not room.in_memory("/proc")
