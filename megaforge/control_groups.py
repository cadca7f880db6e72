"""The control groups that this process is in (Linux, version 2 or 1): what it may use of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# The files of a limit and of what is in use, and what files that were read take of that in memory.stat, by version.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class MemoryLimit(NamedTuple):
    """Bytes that a group may hold, and that it holds now but for file pages that the kernel gives back; None: it does
    not say."""

    limit: int
    used: int | None


def places(controller: str, root: Path = ROOT, groups: Path = GROUPS) -> Iterator[Path]:
    """The directories of the groups whose ``controller`` (``memory``, ``cpu``) this process is under, its own first.

    Args:
        root: where control groups are mounted.
        groups: the process's groups, a line ``number:controllers:/path`` each.
    """
    lines = groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        own = base / path.strip("/")
        for place in (own, *own.parents):  # a container may see its own group as the root
            yield place
            if place == base:
                break


def memory_limits(root: Path = ROOT, groups: Path = GROUPS) -> Iterator[MemoryLimit]:
    """Those of the groups that this process is under."""
    for place in places("memory", root, groups):
        for most, now, cached in _MEMORY:
            with suppress(OSError, ValueError):
                limit = int((place / most).read_text())  # "max" is not a number
                if limit > 0:
                    yield MemoryLimit(limit, _used(place, now, cached))


def _used(place: Path, now: str, cached: str) -> int | None:
    with suppress(OSError, ValueError):
        used = int((place / now).read_text())
        stat = dict(line.split(" ", 1) for line in (place / "memory.stat").read_text().splitlines())
        return max(0, used - int(stat.get(cached, 0)))
    return None
