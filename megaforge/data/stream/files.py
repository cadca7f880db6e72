"""``stream:NAME_OR_GLOB``: the text files that a stream reads, in their order, and what tells that one has changed."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.stream.fetch import describe, expanded, is_remote
from megaforge.data.text.formats import TEXT_SUFFIXES, plain_suffix, text_format
from megaforge.data.text.readers import open_text
from megaforge.errors import UserError, require

PREFIX = "stream:"
_HUB = "hf:"
_ENDS = 1 << 16


@dataclass(frozen=True)
class StreamFile:
    """A file: its path or address, and an ``identity`` that changes with its content (its size and ends, or what the
    server says of it)."""

    name: str
    identity: str


def stream_names(spec: str) -> list[str]:
    """The files that ``spec`` names, without opening them: a path, a glob (``**`` too), a directory, an address with
    ``{000..015}`` in it, ``@FILE`` with a name a line, or ``hf:NAME[:CONFIG[:SPLIT]]`` of Hugging Face's hub or a
    directory that ``datasets`` reads.

    Raises:
        UserError: there is none.
    """
    text = spec.removeprefix(PREFIX)
    found = list(_names(text, spec))
    if not found:
        raise UserError(f"--data-path {spec}: there is no such file; give a file, a directory, a glob or an address")
    return found


def _names(text: str, spec: str) -> Iterator[str]:
    if text.startswith(_HUB):
        yield from _hub_files(text.removeprefix(_HUB), spec)
    elif text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--data-path {spec}: {text[1:]} cannot be read ({reason})") from error
        for line in filter(None, map(str.strip, lines)):
            yield from _names(line, spec)
    elif is_remote(text):
        yield from expanded(text)
    elif os.path.isdir(text):
        inside = sorted(path for path in Path(text).rglob("*") if path.is_file())
        yield from (str(path) for path in inside if plain_suffix(path) in TEXT_SUFFIXES)
    elif os.path.exists(text):
        yield text
    else:
        yield from sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))


def _hub_files(name: str, spec: str) -> Iterator[str]:
    """The data files of a data set that ``datasets`` knows, as its builder lists them."""
    datasets: Any = require("datasets", extra="corpus", purpose=f"--data-path {spec}")
    name, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        files = (builder.config.data_files or {}).get(split or "train") or ()
    except Exception as error:  # whatever the hub, the network or the builder raise
        raise UserError(f"--data-path {spec}: 'datasets' cannot list its files ({error})") from error
    yield from map(str, files)


def check_local(name: str, spec: str, key: str) -> None:
    """
    Raises:
        UserError: the file is missing, damaged, of another kind than text, or a table without the column ``key``.
    """
    try:
        if text_format(name).is_table:
            open_text(name, key).close()
    except UserError as error:
        raise UserError(f"--data-path {spec}: {str(error).replace('--input ', '')}") from error


def stream_files(spec: str) -> list[StreamFile]:
    """The files and their identities.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    names = stream_names(spec)
    with ThreadPoolExecutor(16) as pool:  # of remote files a request each
        return list(pool.map(StreamFile, names, pool.map(lambda name: identity(name, spec), names)))


def identity(name: str, spec: str) -> str:
    """What tells one content of a file from another.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return describe(name).identity if is_remote(name) else _local_identity(name)
    except OSError as error:
        raise UserError(f"--data-path {spec}: {name} cannot be read ({error.strerror or error})") from error


def _local_identity(name: str) -> str:
    size = os.path.getsize(name)
    digest = hashlib.sha256(f"{size}:".encode())
    with open(name, "rb") as file:
        digest.update(file.read(_ENDS))
        if size > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()[:32]


def changed_file(before: Sequence[Sequence[str]], now: Sequence[StreamFile]) -> str | None:
    """What differs between the files of a checkpoint, (name, identity) each, and those of now, in words."""
    for number, file in enumerate(now):
        if number >= len(before):
            return f"{file.name} is new"
        if before[number][1] != file.identity:
            if before[number][0] == file.name:
                return f"{file.name} has changed"
            return f"file {number + 1} was {before[number][0]} and is now {file.name}"
    return f"{before[len(now)][0]} is gone" if len(before) > len(now) else None
