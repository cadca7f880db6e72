"""How full disks are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def disk_share(paths: Iterable[Path]) -> float:
    """How full the fullest file system is that ``paths`` are on, or will be, of its bytes or inodes; as ``df`` says it:
    what only root may fill counts as full. 0 without any."""
    return max((_share(path) for path in paths), default=0.0)


def _share(path: Path) -> float:
    try:
        found = os.statvfs(next(one for one in (path, *path.parents) if one.exists()))
    except OSError:  # what is wrong with it is told by those who write there
        return 0.0
    used, usable = found.f_blocks - found.f_bfree, found.f_blocks - found.f_bfree + found.f_bavail
    inodes = 1 - found.f_favail / found.f_files if found.f_files else 0.0
    return max(used / usable if usable else 0.0, inodes)
