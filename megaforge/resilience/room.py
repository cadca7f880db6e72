"""How much more a folder in memory may take before the machine runs short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

RESERVE = 0.05  # share of the file system, and of the memory, that stays free


def free_bytes(folder: Path) -> int:
    """Bytes that may be written below ``folder``, which exists: of its file system's room, and where that is memory of
    what the machine and this process's control group have left."""
    held = os.statvfs(folder)
    free = held.f_bavail * held.f_frsize - RESERVE * held.f_blocks * held.f_frsize
    if in_memory(folder):
        free = min(free, *_free_memory())
    return max(0, int(free))


def in_memory(folder: Path) -> bool:
    """Whether ``folder`` lies on a tmpfs."""
    path, best, kind = os.path.realpath(folder), "", ""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, place, fs, *_ = line.split(" ")
            if len(place) >= len(best) and (path == place or path.startswith(place.rstrip("/") + "/")):
                best, kind = place, fs
    return kind in ("tmpfs", "ramfs", "hugetlbfs")


def _free_memory() -> list[float]:
    """What the machine has left, and what the control group may still take, less the reserve."""
    found = []
    meminfo = _numbers("/proc/meminfo", ":")
    if "MemAvailable" in meminfo:
        found.append(1024 * (meminfo["MemAvailable"] - RESERVE * meminfo["MemTotal"]))
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        cached = _numbers("/sys/fs/cgroup/memory.stat", " ").get("inactive_file", 0)
        found.append((1 - RESERVE) * limit - used + cached)
    return found or [float("inf")]


def _numbers(path: str, separator: str) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(separator)
            with contextlib.suppress(ValueError, IndexError):
                found[name] = int(rest.split()[0])
    return found


def _number(path: str) -> int | None:
    """None where there is no such file, or it says ``max``."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(path).read_text(encoding="ascii", errors="replace"))
    return None
