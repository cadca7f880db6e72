"""Files from elsewhere: copied into ``--data-cache-dir``, however often the connection breaks."""

from __future__ import annotations

import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from megaforge.durable import give_name
from megaforge.errors import UserError, require

RETRIES = 3  # after an attempt that brought nothing
FIRST_WAIT = 0.5  # seconds; each further one waits twice as long
_BLOCK, _TIMEOUT = 1 << 20, 60.0
_BY_URLLIB = ("http://", "https://")
_HEAD_REFUSED = (403, 405, 501)  # by servers that answer GET: signed addresses of object stores, small servers
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(name: str) -> bool:
    """Whether ``name`` is an address: ``https://...``, or another that ``fsspec`` opens (``hf://``, ``s3://``)."""
    return "://" in name


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file.

    Attributes:
        size: bytes; None where it does not say.
        mark: of its content, or its date.
        content_type: in MIME's words, or nothing.
    """

    size: int | None
    mark: str
    content_type: str = ""

    @property
    def identity(self) -> str:
        """What changes with the content, 32 hexadecimal digits."""
        return hashlib.sha256(f"{self.size}:{self.mark}".encode()).hexdigest()[:32]


def expanded(address: str) -> Iterator[str]:
    """``part-{000..015}`` as sixteen addresses, as WebDataset writes them."""
    match = _RANGE.search(address)
    if match is None:
        yield address
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from expanded(f"{address[: match.start()]}{number:0{len(first)}d}{address[match.end() :]}")


def describe(address: str) -> RemoteFile:
    """Asks the server of a file.

    Raises:
        UserError: there is no such file.
        OSError: it could not be asked.
    """
    found: RemoteFile = _patiently(lambda: _describe(address))
    return found


def _describe(address: str) -> RemoteFile:
    if not address.startswith(_BY_URLLIB):
        info = _filesystem(address).info(address)
        return RemoteFile(info.get("size"), str(info.get("ETag") or info.get("blob_id") or info.get("mtime")))
    try:
        answer = _opened(urllib.request.Request(address, method="HEAD"))
    except urllib.error.HTTPError as error:
        if error.code not in _HEAD_REFUSED:
            raise
        answer = _opened(urllib.request.Request(address))
    with answer:
        size = answer.headers.get("Content-Length")
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return RemoteFile(None if size is None else int(size), _mark(answer), kind)


def _mark(answer: Any) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified"))


def fetch(address: str, target: Path) -> Path:
    """``target`` with the content of ``address``: what was copied before a break or a kill is not copied again.

    Each attempt that brings nothing is followed by three more, with growing waits.

    Raises:
        UserError: the server cannot be reached, or says that there is no such file.
        OSError: the disk is full, or ``target`` cannot be written.
    """
    if target.exists():
        return target
    part, mark_file = Path(f"{target}.part"), Path(f"{target}.mark")
    target.parent.mkdir(parents=True, exist_ok=True)

    def attempt() -> None:
        mark = mark_file.read_text() if mark_file.exists() and part.exists() else ""
        with part.open("ab") as out:
            for content in _rest(address, out.tell(), mark, mark_file, out):
                out.write(content)

    _ = _patiently(attempt, lambda: part.stat().st_size if part.exists() else 0)
    give_name(part, target)
    mark_file.unlink(missing_ok=True)
    return target


def _rest(address: str, offset: int, mark: str, mark_file: Path, out: IO[bytes]) -> Iterator[bytes]:
    """The content from ``offset`` on, if it is still the one of ``mark``; otherwise ``out`` is emptied first.

    Raises:
        OSError: the connection broke before the end.
    """
    if not address.startswith(_BY_URLLIB):
        with _filesystem(address).open(address, "rb") as file:
            file.seek(offset)
            while content := file.read(_BLOCK):
                yield content
        return
    request = urllib.request.Request(address)
    if offset and mark:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", mark)
    try:
        answer = _opened(request)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing behind what we have: it is the end, or another file
            raise
        mark_file.unlink(missing_ok=True)
        out.truncate(0)
        raise OSError(f"{address}: the file is shorter than what was copied of it") from error
    with answer:
        begun = offset if answer.status == 206 else 0
        if begun != offset:
            out.truncate(0)
        mark_file.write_text(_mark(answer))
        length = answer.headers.get("Content-Length")
        read = 0
        while content := answer.read1(_BLOCK):
            read += len(content)
            yield content
        if length is not None and read < int(length):
            raise OSError(f"the connection broke after {begun + read:,} of {begun + int(length):,} bytes")


def _opened(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=_TIMEOUT)


def _filesystem(address: str) -> Any:
    fsspec: Any = require("fsspec", extra="replica", purpose=f"reading {address}")
    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: fsspec cannot open it ({error})") from error


def _patiently(action: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
    """The result of ``action``, repeated where it fails: three times in a row that ``progress`` stays as it was.

    Raises:
        OSError: it failed each time.
        UserError: what no repetition makes right.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return action()
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in (408, 425, 429):
                raise UserError(f"{error.url}: the server answers {error.code} ({error.reason})") from error
            problem: Exception = error
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            problem = error
        failures = 0 if progress() > before else failures + 1
        if failures > RETRIES:
            raise OSError(f"{problem} (tried {failures} times)") from problem
        if failures:
            time.sleep(FIRST_WAIT * 2 ** (failures - 1))


_OF_THE_DISK = frozenset({28, 122, 30, 13})  # ENOSPC, EDQUOT, EROFS, EACCES
