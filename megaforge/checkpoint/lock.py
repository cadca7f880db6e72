"""One run at a time saves below a directory: a lock that ends with the process that holds it.

It is a POSIX record lock on ``DIR/.lock``, which local file systems and NFS know: a killed run's lock is gone, and no
age of a file has to be guessed. The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from megaforge.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PATIENCE = 5.0  # seconds for a run that is being ended while it is started again
_NOT_KNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class SaveLock:
    """The right to save below ``directory``, which :meth:`release`, or the end of the process, gives back."""

    def __init__(self, directory: Path, file: TextIO | None) -> None:
        self.directory, self._file = directory, file

    def release(self) -> None:
        """Gives it back; a second time does nothing."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # a disk that has become read-only: the lock ends all the same
            (self.directory / LOCK_FILE).unlink()
        self._file.close()
        self._file = None

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def take_lock(directory: Path, patience: float = PATIENCE) -> SaveLock:
    """The lock of ``directory``, which exists; waits ``patience`` seconds for another run that holds it.

    Where the file system knows no locks, a warning says so, and nothing keeps another run out.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path, until = directory / LOCK_FILE, time.monotonic() + patience
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--save {directory}: {LOCK_FILE} cannot be written there ({error.strerror})") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NOT_KNOWN:
                logger.warning("--save %s: its file system knows no locks; let no other run save there", directory)
                file.close()
                return SaveLock(directory, None)
            owner = _owner(file)
            file.close()
            if time.monotonic() >= until:
                raise UserError(
                    f"--save {directory}: another run saves there ({owner}); end it, or name another directory"
                ) from error
            time.sleep(0.1)
            continue
        if _is_at(file, path):
            return _claimed(directory, file)
        file.close()  # its owner has removed it meanwhile


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _claimed(directory: Path, file: TextIO) -> SaveLock:
    told = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        file.seek(0)
        file.truncate()
        file.write(json.dumps(told) + "\n")
        file.flush()
    return SaveLock(directory, file)


def _owner(file: TextIO) -> str:
    try:
        file.seek(0)
        told = json.loads(file.read())
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{LOCK_FILE} is locked"
