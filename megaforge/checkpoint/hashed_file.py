"""A new file that is hashed, and sent to the disk, while it is written: for large ones three threads share the work, of
which each alone would take about as long as the disk."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megaforge.durable import sync_path

# sha256 by measurement: 1.7 GB a CPU-second on Zen 5 through hashlib (its SHA instructions are in x86 since 2017 and
# in ARMv8) against 1.05 for blake2b and 0.55 for blake2s, and everybody has sha256sum at hand.
HASH = "sha256"
_BLOCK = 1 << 20  # still in the cache when the write reads what the hash has read
_LARGE = 8 << 20  # bytes from which threads pay
_AHEAD = 64  # blocks that may wait for their hash
_SYNC = 32 << 20  # bytes after which the disk is to begin


class FileRecord(NamedTuple):
    """What a finished file must look like: its length in bytes and the hex sha256 of its content."""

    bytes: int
    sha256: str


class _Helper:
    """A thread that does ``work`` on what it is given, in order; an error stops it and is raised by :meth:`end`."""

    def __init__(self, work: Callable[[Any], object], waiting: int) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._given: queue.Queue[Any] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="checkpoint file", daemon=True)
        self._thread.start()

    def give(self, item: Any) -> None:
        """Waits where too many wait already."""
        self._given.put(item)

    def offer(self, item: Any) -> None:
        """Only where none waits."""
        if self._given.empty():
            self._given.put(item)

    def end(self) -> BaseException | None:
        """Once all is done: what stopped it, or None."""
        self._given.put(None)
        self._thread.join()
        return self._error

    def _run(self) -> None:
        while (item := self._given.get()) is not None:
            try:
                if self._error is None:
                    self._work(item)
            except BaseException as error:  # raised in the thread that writes
                self._error = error


class HashedFile:
    """The file ``path``, which must not exist, of about ``size`` bytes. Use it in a ``with`` statement.

    Raises:
        FileExistsError: it exists.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "xb", buffering=0)
        self._digest, self._written, self._unsynced = hashlib.new(HASH), 0, 0
        self._hasher = self._syncer = None
        if size >= _LARGE:
            self._hasher = _Helper(self._digest.update, _AHEAD)
            self._syncer = _Helper(lambda descriptor: os.fdatasync(descriptor), 1)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _ = self._end_helpers()  # what went wrong in them :meth:`finish` has raised, or ``error`` came before it
        self._file.close()

    def write(self, data: memoryview) -> None:
        """Appends ``data``, whose memory must not change before :meth:`finish`.

        Raises:
            OSError: the disk is full among others; the half-written file is left behind.
        """
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if self._hasher is None:
                self._digest.update(block)
            else:
                self._hasher.give(block)
            while block:
                block = block[self._file.write(block) :]
        self._written += len(data)
        self._unsynced += len(data)
        if self._syncer is not None and self._unsynced >= _SYNC:
            self._syncer.offer(self._file.fileno())
            self._unsynced = 0

    def finish(self) -> FileRecord:
        """Waits until the disk has all of it.

        Raises:
            OSError: it has not. One that an earlier sync met is raised too: the system tells of each only once.
        """
        errors = self._end_helpers()
        if errors:
            raise errors[0]
        os.fsync(self._file.fileno())
        return FileRecord(self._written, self._digest.hexdigest())

    def _end_helpers(self) -> list[BaseException]:
        found = [helper.end() for helper in (self._hasher, self._syncer) if helper is not None]
        self._hasher = self._syncer = None
        return [error for error in found if error is not None]


def sync_all(paths: list[Path]) -> None:
    """Waits until the disk has these files, or names in directories; all at once, for each wait is a turn of the disk.

    Raises:
        OSError: it has not.
    """
    helpers = [_Helper(sync_path, 1) for _ in paths]
    for helper, path in zip(helpers, paths, strict=True):
        helper.give(path)
    for error in [helper.end() for helper in helpers]:
        if error is not None:
            raise error
