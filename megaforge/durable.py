"""Waiting until the disk has something."""

from __future__ import annotations

import os


def sync_path(path: str | os.PathLike[str]) -> None:
    """Waits until the disk has the content of a file, or the names in a directory: fsync of a file says nothing about
    its name.

    Raises:
        OSError: it has not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
