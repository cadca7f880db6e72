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


def test_what_the_machine_and_the_control_groups_may_still_take(tmp_path):
    machine, groups = tmp_path / "meminfo", tmp_path / "groups"
    machine.write_text("MemTotal: 1000 kB\nMemAvailable: 500 kB\nHugePages_Total: 0\n")
    groups.write_text("0::/job/step\n")
    step = tmp_path / "job/step"
    step.mkdir(parents=True)
    for place, limit in ((step, "400000\n"), (step.parent, "max\n"), (tmp_path, "350000\n")):
        (place / "memory.max").write_text(limit)
        (place / "memory.current").write_text("300000\n")
        (place / "memory.stat").write_text("anon 7\ninactive_file 50000\n")
    found = room._free_memory(tmp_path, groups, machine)
    assert found == [1024 * 450, 380_000 - 250_000, 332_500 - 250_000], "of the group around it as well"
    (step / "memory.stat").unlink()
    assert room._free_memory(tmp_path, groups, machine) == [1024 * 450, 332_500 - 250_000]
    assert room._free_memory(tmp_path, tmp_path / "none", tmp_path / "none") == [float("inf")]


def test_where_memory_is_a_folder(tmp_path):
    if not os.path.ismount("/dev/shm"):
        pytest.skip("this machine has no shared memory")
    assert room.in_memory("/dev/shm") and not room.in_memory("/proc")
