"""How much more a folder in memory may take before the machine runs short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megaforge.control_groups import GROUPS, ROOT, memory_limits

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


def _free_memory(root: Path = ROOT, groups: Path = GROUPS, machine: Path = Path("/proc/meminfo")) -> list[float]:
    """What the machine has left, and what each control group (:func:`megaforge.control_groups.memory_limits`) may still
    take, less the reserve."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (line.split(":") for line in machine.read_text(encoding="ascii", errors="replace").splitlines())
        sizes = {name: 1024 * int(size.split()[0]) for name, size in lines}
        found.append(sizes["MemAvailable"] - RESERVE * sizes["MemTotal"])
    limits = memory_limits(root, groups)
    found += [(1 - RESERVE) * limit - used for limit, used in limits if used is not None]
    return found or [float("inf")]
