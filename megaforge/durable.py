"""Waiting until the disk has something, and files that others see whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def give_name(part: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Renames ``part`` to ``path``, in the same file system, once the disk has its content, and waits until it has the
    name: after a crash at any moment ``path`` holds all of the old content or all of the new.

    Raises:
        OSError: the content did not reach the disk; ``path`` is as it was, unless only its new name did not.
    """
    sync_path(part)
    os.replace(part, path)
    sync_path(Path(path).parent)


@contextmanager
def replacing(path: str | os.PathLike[str], temporary: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Gives the name of a file beside ``path`` to write, which becomes ``path`` when the block ends well
    (:func:`give_name`).

    A block that takes its file away again leaves ``path`` as it is. What a killed process has left under the temporary
    name is overwritten by the next.

    Args:
        temporary: the name to write (default: ``.NAME.tmp`` in the same directory); two processes that may write at
            the same time need names of their own.

    Raises:
        OSError: as :func:`give_name` has it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.tmp") if temporary is None else Path(temporary)
    try:
        part.unlink(missing_ok=True)
        yield part
        if part.exists():
            give_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def set_aside(path: Path, start: int, stop: int) -> None:
    """Moves bytes [start, stop) of ``path`` to the end of ``PATH.abandoned``, and drops what follows them.

    Raises:
        OSError: they could not be moved; ``path`` is as it was.
    """
    if start < stop:
        with path.open("rb") as file, path.with_name(path.name + ".abandoned").open("ab") as aside:
            file.seek(start)
            aside.write(file.read(stop - start))
            aside.flush()
            os.fsync(aside.fileno())
    if start < path.stat().st_size:
        os.truncate(path, start)
