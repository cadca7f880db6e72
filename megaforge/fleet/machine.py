"""What this machine, or the part of it that a container gives, has left for models."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megaforge.errors import require

GB = 1e9
_CGROUP, _GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Machine(NamedTuple):
    """Attributes:
    cpus: that this process may use.
    memory: bytes that it and those beside it may fill.
    free_memory: bytes of them that are left.
    load: share of the machine's CPUs that was busy, 0 to 1, since the last look.
    """

    cpus: int
    memory: float
    free_memory: float
    load: float


def look(root: Path = _CGROUP, groups: Path = _GROUPS) -> Machine:
    """Reads the control groups' limits (version 2 or 1), and what the machine has.

    Args:
        root: where control groups are mounted.
        groups: the process's groups, a line ``number:controllers:/path`` each.

    Raises:
        UserError: psutil is not installed.
        OSError: the system does not say.
    """
    psutil = require("psutil", extra="fleet", purpose="looking at the machine")
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    cpus = float(len(os.sched_getaffinity(0)))
    for place in _places(root, groups):
        limit, used = _memory_of(place)
        if limit is not None and limit < total:
            total = limit
            free = min(free, limit - used)
        cpus = min(cpus, _cpus_of(place))
    return Machine(max(1, int(cpus)), total, max(0.0, free), psutil.cpu_percent() / 100)


def _places(root: Path, groups: Path) -> list[Path]:
    """Directories of the groups that this process is in, and of those around them."""
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    found = [root, root / "memory", root / "cpu"]  # a container may see its own group as the root
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        bases = [root / name for name in controllers.split(",")] if controllers else [root]
        for own in (base / path.strip("/") for base in bases):
            found += [place for place in (own, *own.parents) if root in (place, *place.parents)]
    return list(dict.fromkeys(found))


def _memory_of(place: Path) -> tuple[float | None, float]:
    """(limit, bytes in use but for file pages that can go); None where there is no limit."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            most, now = float((place / limit).read_text()), float((place / used).read_text())
            stat = dict(line.split(" ", 1) for line in (place / "memory.stat").read_text().splitlines())
            return most, max(0.0, now - float(stat.get(cached, 0)))
    return None, 0.0


def _cpus_of(place: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (place / "cpu.max").read_text().split()
        return float(quota) / float(period)
    with suppress(OSError, ValueError):
        quota = (place / "cpu.cfs_quota_us").read_text()
        if float(quota) > 0:
            return float(quota) / float((place / "cpu.cfs_period_us").read_text())
    return float("inf")


def free_disk(directory: Path) -> float:
    """Bytes free where ``directory`` is or will be.

    Raises:
        OSError: nothing can be said of it.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return float(shutil.disk_usage(place).free)
