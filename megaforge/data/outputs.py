"""How an offline tool writes: parents are made, a file appears whole or not at all, and nothing else is replaced."""

from __future__ import annotations

import filecmp
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from megaforge.durable import replacing
from megaforge.errors import UserError, require


def make_parents(path: str | os.PathLike[str], flag: str) -> None:
    """Makes the directories that ``flag PATH`` lies in.

    Raises:
        UserError: they cannot be made.
    """
    parent = Path(path).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: the directory {parent} cannot be made ({error.strerror})") from error


def temporary_path(name: str) -> Path:
    """What this process calls ``name`` until it is whole."""
    return Path(f"{name}.tmp-{os.getpid()}")


@contextmanager
def atomic_output(name: str, force: bool = False, flag: str = "--output") -> Iterator[IO[bytes]]:
    """A file to write (compressed if its name says so) that takes its name only when the block ends well.

    A file that stands there already is kept where it holds the same bytes, and else replaced only with ``force``.

    Raises:
        UserError: another file stands there, or it cannot be written.
    """
    make_parents(name, flag)
    try:
        with replacing(name, temporary_path(name)) as temporary:
            with ExitStack() as stack:
                raw = stack.enter_context(temporary.open("wb"))
                stream: Any = raw
                if name.lower().endswith(".gz"):
                    stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
                elif name.lower().endswith(".zst"):
                    zstandard = require("zstandard", extra="data", purpose=f"{flag} {name}")
                    writer = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
                    stream = stack.enter_context(io.BufferedWriter(writer, 1 << 20))
                yield stream
                stream.flush()
            if not force and os.path.lexists(name):
                if not (os.path.isfile(name) and filecmp.cmp(temporary, name, shallow=False)):
                    raise refuse_to_replace(name, flag)
                temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}; choose a writable {flag}") from error


def refuse_to_replace(name: str, flag: str) -> UserError:
    """The complaint about another result in the way."""
    return UserError(
        f"{flag} {name} exists, and this command on this input gives something else; choose another name, or pass "
        "--force to replace it"
    )
