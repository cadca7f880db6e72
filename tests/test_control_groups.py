"""What control groups of either version say of memory, and which of them hold a process."""

from __future__ import annotations

from pathlib import Path

from megaforge.control_groups import MemoryLimit, memory_limits, places


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_process_is_under_its_own_group_and_those_around_it(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    assert list(places("memory", tmp_path, groups)) == [], "there are none"
    groups.write_text("4:memory,pids:/a/b\n3:cpu:/c\nnot a line\n0::/d\n")
    memory = [tmp_path / "memory" / name for name in ("a/b", "a", "")]
    assert list(places("memory", tmp_path, groups)) == [*memory, tmp_path / "d", tmp_path]
    assert list(places("cpu", tmp_path, groups)) == [tmp_path / "cpu/c", tmp_path / "cpu", tmp_path / "d", tmp_path]


def test_what_is_in_use_leaves_out_what_can_go(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("1:memory:/old\n0::/new\n")
    old = {"memory__limit_in_bytes": "900", "memory__usage_in_bytes": "500"}
    write(tmp_path / "memory/old", **old, memory__stat="inactive_file 1\ntotal_inactive_file 200\n")
    write(tmp_path / "new", memory__max="800", memory__current="100", memory__stat="inactive_file 300\n")
    write(tmp_path, memory__max="max")
    assert list(memory_limits(tmp_path, groups)) == [MemoryLimit(900, 300), MemoryLimit(800, 0)]
    (tmp_path / "new/memory.stat").unlink()
    assert list(memory_limits(tmp_path, groups))[1] == MemoryLimit(800, None), "what cannot be read is not guessed"
