"""How an entry script ends: one clear message, a status on every rank, and no rank left waiting for another."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megaforge.errors import UserError

USER_ERROR_STATUS = 2
CRASH_STATUS = 1
# Launchers that start one process a rank say who we are in these variables: torchrun, SLURM, Open MPI, MPICH and PMIx.
_RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
_SECONDS_FOR_RANK_0 = 5.0


def launched_rank() -> tuple[int, int]:
    """(rank, world size) as the launcher's environment says, without a process group; (0, 1) for a lone process."""
    for rank, size in _RANK_VARIABLES:
        if os.environ.get(rank, "").isdigit() and os.environ.get(size, "").isdigit():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def run_entry(main: Callable[[], int | None]) -> NoReturn:
    """Calls ``main`` and ends the process: status 0 (or what it returns), 2 after a user's mistake, 1 after a crash.

    A :class:`UserError` is printed once, as ``error: ...``, by rank 0. Another rank waits a moment first: where every
    rank made the same complaint, the launcher ends it in that time; where it is alone with it, it says so itself.
    After an exception a rank of many leaves at once, without destructors: those of a process group may wait for peers
    that wait for us, while the launcher ends all ranks as soon as one has left with an error.
    """
    rank, size = launched_rank()
    try:
        status = main() or 0
    except UserError as error:
        if rank:
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"error (rank {rank}): {error}" if rank else f"error: {error}", file=sys.stderr)
        _leave(USER_ERROR_STATUS, size)
    except KeyboardInterrupt:
        _leave(130, size)
    except Exception:
        text = traceback.format_exc()
        if size > 1:
            text = "".join(f"[rank {rank}] {line}" for line in text.splitlines(keepends=True))
        print(text, file=sys.stderr, end="")
        _leave(CRASH_STATUS, size)
    sys.exit(status)


def _leave(status: int, size: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if size > 1:
        os._exit(status)
    sys.exit(status)
