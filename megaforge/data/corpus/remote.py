"""Files of a source that lie behind addresses: asked about when a run begins, copied while they are read."""

from __future__ import annotations

import mimetypes
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from megaforge.data.cache import alone
from megaforge.data.corpus.readers.reader import reader_for
from megaforge.data.stream.fetch import RemoteFile, describe, expanded, fetch, is_remote
from megaforge.errors import UserError

_ASKED_AT_ONCE = 16
_LONGEST_NAME = 100


def file_name(address: str) -> str:
    """What the file behind an address is called: the last part of its path."""
    return posixpath.basename(urlsplit(address).path.rstrip("/"))


def remote_reader(address: str, file: RemoteFile) -> str | None:
    """The name of the reader of a file, by its name and then by what the server calls its content; None: none reads
    such files."""
    by_name = reader_for(file_name(address))
    return by_name or reader_for(f"x{mimetypes.guess_extension(file.content_type) or ''}")


def ask(patterns: Sequence[str]) -> dict[str, RemoteFile | UserError]:
    """What the servers say of each of the addresses among ``patterns``, with ``{000..015}`` as sixteen; an error where
    there is no such file.

    Raises:
        UserError: a server cannot be reached.
    """
    addresses = list(dict.fromkeys(one for name in patterns if is_remote(name) for one in expanded(name)))
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return dict(zip(addresses, pool.map(_answer, addresses), strict=True))


def _answer(address: str) -> RemoteFile | UserError:
    try:
        return describe(address)
    except UserError as error:
        return error
    except OSError as error:
        raise UserError(f"{address}: {error}; nothing was begun: run the same command again") from error


def check_identity(address: str, identity: str) -> None:
    """
    Raises:
        UserError: the file is not as it was when the run began, or the server cannot be reached.
    """
    found = _answer(address)
    if isinstance(found, UserError):
        raise found
    if found.identity != identity:
        raise UserError(f"{address} changed since the run began; run the command again, which starts anew")


@contextmanager
def copied(address: str, folder: Path, number: int) -> Iterator[str]:
    """The path of a copy of the file for the time of the block; what a killed run copied of it is not copied again.

    Args:
        folder: where copies lie.
        number: the unit's, which no other address has.

    Raises:
        UserError: the server cannot be reached, however often it is tried, or has no such file.
        OSError: the copy cannot be written.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:06d}-{file_name(address)[-_LONGEST_NAME:]}"
    with alone(Path(f"{path}.lock")):
        try:
            fetch(address, path)
        except OSError as error:
            if error.errno is not None:  # the disk's
                raise
            raise UserError(f"{address}: {error}; run the same command again, which goes on where it was") from error
        try:
            yield str(path)
        finally:
            path.unlink(missing_ok=True)
