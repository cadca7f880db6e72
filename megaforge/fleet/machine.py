"""What this machine, or the part of it that a container gives, has left for models."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megaforge.control_groups import GROUPS, ROOT, memory_limits, places
from megaforge.errors import require

GB = 1e9


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


def look(root: Path = ROOT, groups: Path = GROUPS) -> Machine:
    """Reads the control groups' limits (:func:`megaforge.control_groups.places`, which says what is given), and what
    the machine has.

    Raises:
        UserError: psutil is not installed.
        OSError: the system does not say.
    """
    psutil = require("psutil", extra="fleet", purpose="looking at the machine")
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    cpus = float(len(os.sched_getaffinity(0)))
    for limit, used in memory_limits(root, groups):
        if used is not None and limit < total:
            total = float(limit)
            free = min(free, total - used)
    cpus = min([cpus, *(_cpus_of(place) for place in places("cpu", root, groups))])
    return Machine(max(1, int(cpus)), total, max(0.0, free), psutil.cpu_percent() / 100)


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
