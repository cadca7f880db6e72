"""How an entry script ends: one clear message, a status on every rank, and no rank left waiting for another."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megaforge.config.launcher import discover_launch
from megaforge.errors import UserError

USER_ERROR_STATUS = 2
CRASH_STATUS = 1
INTERRUPTED_STATUS = 130
CLOSED_PIPE_STATUS = 141  # what a shell shows for a program that SIGPIPE ended
_SECONDS_FOR_RANK_0 = 5.0
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# What a path is to blame for, not the program.
_BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


def launched_rank() -> tuple[int, int]:
    """(rank, world size) as the launcher's environment says, without a process group; (0, 1) where it says nothing
    that makes sense."""
    try:
        launch = discover_launch()
    except UserError:
        return 0, 1
    return launch.rank, launch.world_size


def run_entry(main: Callable[[], int | None], interrupted: str | None = None) -> NoReturn:
    """Calls ``main`` and ends the process: status 0 (or what it returns), 2 after a user's mistake or a full disk, 130
    after Ctrl-C, 141 when the reader of its output has gone, 1 after a crash. Import what is slow inside ``main``: all
    of this then holds for the imports too.

    A :class:`UserError` is printed once, as ``error: ...``: by torchrun, in its summary of what failed, or by rank 0.
    Another rank waits a moment first: where every rank made the same complaint, the launcher ends it in that time;
    where only it has the complaint, it prints it. A rank of many leaves at once, without destructors: those of a
    process group may wait for peers that wait for us, or abort although all is done, while the launcher ends all ranks
    as soon as one has left with an error.

    Args:
        main: the program.
        interrupted: what to say after Ctrl-C; None: nothing.
    """
    try:
        status = _call(main)
    except UserError as error:
        _complain(str(error))
    except KeyboardInterrupt:
        _say(interrupted)
        _leave(INTERRUPTED_STATUS)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            _leave(CLOSED_PIPE_STATUS)
        if error.errno in _BAD_PATH and error.filename:
            _complain(f"{os.fsdecode(error.filename)}: {os.strerror(error.errno or 0)}; name another file or directory")
        if error.errno not in _FULL_DISK:
            _crash(error)
        where = error.filename or "standard output or a temporary file"
        _complain(f"{where}: cannot be written: {os.strerror(error.errno or 0)}; make room and start it again")
    except Exception as error:
        _crash(error)
    _leave(status)


def _call(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    finally:
        _flush()  # here, where a closed pipe and a full disk are still heard of


def _complain(message: str) -> NoReturn:
    rank, _ = launched_rank()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's: nothing here is worth saving any more
        time.sleep(_SECONDS_FOR_RANK_0)
    line = f"error (rank {rank}): {message}" if rank else f"error: {message}"
    if not _told_torchrun(line):
        _say(line)
    _leave(USER_ERROR_STATUS)


def _crash(error: BaseException) -> NoReturn:
    rank, size = launched_rank()
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    if not _told_torchrun(f"{type(error).__name__}: {error}", text):
        _say("".join(f"[rank {rank}] {line}" for line in text.splitlines(keepends=True)) if size > 1 else text)
    _leave(CRASH_STATUS)


def _told_torchrun(message: str, callstack: str | None = None) -> bool:
    """Leaves the message where torchrun looks for it, in the form of torch.distributed.elastic's ``record``. torchrun
    shows it once it gives up; where it will start the ranks again, it does not, and we must speak ourselves."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    extra = {"timestamp": str(int(time.time()))} | ({"py_callstack": callstack} if callstack else {})
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    except OSError:
        return False
    attempt, last = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return not (attempt.isdigit() and last.isdigit() and int(attempt) < int(last))


def _say(text: str | None) -> None:
    """To standard error, as far as there is one."""
    if text and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _reader_has_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more; other broken pipes are faults."""
    watch = select.poll()
    for descriptor in (1, 2):
        watch.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in watch.poll(0))


def _leave(status: int) -> NoReturn:
    """Ends the process. What cannot be written any more is dropped, so that Python's own last flush is quiet."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if launched_rank()[1] > 1:
        if status == 0:
            _end_mpi()
        os._exit(status)
    sys.exit(status)


def _end_mpi() -> None:
    """Tells mpirun that all is well, where MPI was begun: a process that ends without has failed in its eyes. A rank
    that leaves with an error does not, as the others may never come to it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
