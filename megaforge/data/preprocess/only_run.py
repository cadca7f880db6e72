"""One run at a time writes an output."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaforge.data.preprocess.ranks import RankGroup


@contextmanager
def only_run(output: str | Path, directory: Path, group: RankGroup, flag: str) -> Iterator[str | None]:
    """Holds ``directory/lock`` on rank 0; yields what is wrong: another run that makes ``output`` holds it, or it
    cannot be written. In the end a directory with nothing else in it is removed.

    Args:
        flag: names the output.
    """
    if group.rank:
        yield None
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("w")
    except OSError as error:
        yield f"cannot write {directory}: {error.strerror}; choose another {flag}"
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield f"another process is writing {output} (it holds {directory / 'lock'}); wait for it to end"
            return
        except OSError as error:  # some network file systems have no locks; the run itself needs none
            print(f"{directory}: cannot be locked ({error.strerror}); start no second run on it", file=sys.stderr)
        try:
            yield None
        finally:
            if os.listdir(directory) == ["lock"]:
                (directory / "lock").unlink()
                directory.rmdir()
