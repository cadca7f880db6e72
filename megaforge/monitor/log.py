"""What a run says in words: how much of it, and a file that keeps it with times."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from megaforge.config.launcher import SAID
from megaforge.config.run_config import LoggingConfig
from megaforge.errors import UserError

_RANK = "{rank}"


@contextlib.contextmanager
def logged(config: LoggingConfig, rank: int) -> Iterator[None]:
    """Within, messages of ``--log-level`` and above go to standard error, and to ``--log-file`` with time and rank:
    rank 0's, or every rank's where the file's name holds ``{rank}``. What ends the block early is written there too.

    Raises:
        UserError: the file cannot be written.
    """
    logger = logging.getLogger("megaforge")
    level, handlers = logger.level, list[logging.Handler]()
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(
        logging.Formatter("%(levelname)s: %(message)s" if rank == 0 else f"%(levelname)s (rank {rank}): %(message)s")
    )
    console.addFilter(lambda record: record.name != SAID)  # people have seen it where it was said
    handlers.append(console)
    if config.log_file is not None and (rank == 0 or _RANK in config.log_file):
        handlers.append(_file(config.log_file, rank))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(config.log_level.upper())
    try:
        yield
    except UserError as error:
        logging.getLogger(SAID).error("%s", error)
        raise
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            logging.getLogger(SAID).critical("%s", type(error).__name__, exc_info=error)
        raise
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _file(name: str, rank: int) -> logging.Handler:
    path = Path(name.replace(_RANK, str(rank)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # appends
    except OSError as error:
        raise UserError(f"--log-file {path}: cannot be written ({error.strerror})") from error
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(message)s"))
    return handler
