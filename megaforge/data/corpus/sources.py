"""The files of a corpus' sources, and how they are cut into partitions: by their sizes alone, never by the workers."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaforge.data.corpus.readers.reader import reader_for, reader_named
from megaforge.data.corpus.recipe import Recipe, SourceSettings
from megaforge.data.corpus.remote import ask, check_identity, file_name, remote_reader
from megaforge.data.corpus.walk import DEFAULT_EXCLUDES, shown, walk
from megaforge.data.jsonl import is_compressed
from megaforge.data.left_out import LeftOut
from megaforge.data.stream.fetch import RemoteFile, expanded, is_remote
from megaforge.data.text.formats import TextFormat, text_format
from megaforge.errors import UserError

_MIB = 1 << 20
_EXPANSION = 4  # decompressed over compressed bytes of text, as gzip and Zstandard give it
_MAX_PIECES = 2048  # files of one partition
_COMPRESSED_PIECES = 8  # of one file: reading over what others have takes a sixth more of the whole chain's time
_WORTH_CUTTING = 256 * _MIB  # bytes of text
_LARGE = 1 << 50  # of a unit whose size is not known: it is a partition of its own
HUB = "hub"


@dataclass(frozen=True)
class Unit:
    """One file as it was when the run began, or one shard of a data set that is read as a stream.

    Attributes:
        source: the number of its source in the recipe.
        path: where it lies, or its address; shown: what it is called in the corpus.
        reader: the name of its reader.
        bytes, version: what tells that it was changed; of a local file its size and time (ns), of another what its
            server says.
        places: the end of its places where it can be cut, else 0.
    """

    source: int
    path: str
    shown: str
    reader: str
    bytes: int
    version: int | str
    places: int

    @property
    def label(self) -> str:
        """What it is called in messages: the path of a file."""
        return self.shown if self.reader == HUB else self.path

    @property
    def remote(self) -> bool:
        """Whether it is a file behind an address."""
        return self.reader != HUB and is_remote(self.path)


@dataclass(frozen=True)
class Piece:
    """The records of a unit that begin in [start, stop)."""

    unit: int
    start: int
    stop: int | None


def find_units(recipe: Recipe, left_out: LeftOut, on_error: str) -> list[Unit]:
    """Every file of every source in order; what is not read is named in ``left_out``.

    Raises:
        UserError: a source without files, or (with ``on_error`` fail) a file that cannot be read.
    """
    units: list[Unit] = []
    for number, source in enumerate(recipe.sources):
        before = len(units)
        if source.hub is None:
            units.extend(_file_units(recipe, number, source, left_out, on_error))
        else:
            units.extend(_hub_units(recipe, number, source))
        if len(units) == before:
            where = source.hub or ", ".join(source.files)
            reasons = "; ".join(f"{count:,} x {reason}" for reason, count in list(left_out.counts.items())[:3])
            raise UserError(f"{recipe.label}: sources: {source.name}: no file to read in {where} ({reasons or 'none'})")
    return units


def cut(units: Sequence[Unit], size: int) -> list[list[Piece]]:
    """The partitions, of about ``size`` bytes of text each: small files share one, large ones are cut where they can
    be. No partition holds two sources.

    Each piece of a compressed file is found by decompressing what stands before it, so that such a file is cut only
    where it is much of the text, and then into few pieces.
    """
    partitions: list[list[Piece]] = []
    open_bytes, open_source = 0, -1
    every = sum(map(expected_bytes, units))
    for number, unit in enumerate(units):
        expected = expected_bytes(unit)
        pieces = -(-expected // size)
        if _compressed(unit):
            pieces = min(pieces, _COMPRESSED_PIECES, 2 * _COMPRESSED_PIECES * expected // every)
        if pieces > 1 and unit.places:
            step = max(1, unit.places * size // expected, -(-unit.places // pieces) if _compressed(unit) else 0)
            starts = range(0, unit.places, step)
            stops: list[int | None] = [*starts[1:], None]
            partitions += [[Piece(number, start, stop)] for start, stop in zip(starts, stops, strict=True)]
            open_source = -1
            continue
        full = open_bytes + expected > size or (partitions and len(partitions[-1]) >= _MAX_PIECES)
        if unit.source != open_source or full:
            partitions.append([])
            open_bytes, open_source = 0, unit.source
        partitions[-1].append(Piece(number, 0, None))
        open_bytes += expected
    return partitions


def expected_bytes(unit: Unit) -> int:
    """About how much text a unit holds."""
    return unit.bytes * (_EXPANSION if unit.reader == "table" or _compressed(unit) else 1)


def _compressed(unit: Unit) -> bool:
    if unit.remote:
        return file_name(unit.path).lower().endswith((".gz", ".zst"))
    return unit.reader != HUB and is_compressed(unit.path)


def whole_files(units: Sequence[Unit]) -> list[str]:
    """The line about a file that cannot be cut and is more than half of the text, which one worker reads."""
    every = sum(map(expected_bytes, units))
    large = [unit for unit in units if 2 * expected_bytes(unit) > every and not unit.places and unit.reader != HUB]
    if not large or expected_bytes(large[0]) < _WORTH_CUTTING:
        return []
    how = "split into several files" if large[0].remote else "uncompressed, or split into several files,"
    return [f"{large[0].path}: one partition, and more than half of the text: one worker reads it; {how} it is shared"]


def check_unchanged(unit: Unit) -> None:
    """
    Raises:
        UserError: the file is not as it was when the run began.
    """
    if unit.reader == HUB:
        return
    if unit.remote:
        check_identity(unit.path, str(unit.version))
        return
    try:
        status = os.stat(unit.path)
    except OSError as error:
        raise UserError(f"{unit.path}: {error.strerror}; it was there when the run began") from error
    if (status.st_size, status.st_mtime_ns) != (unit.bytes, unit.version):
        raise UserError(f"{unit.path} changed since the run began; run the command again, which starts anew")


def _hub_units(recipe: Recipe, number: int, source: SourceSettings) -> Iterator[Unit]:
    """The shards of a data set."""
    from megaforge.data.corpus.readers.hub import HubShard, shards_of

    files = tuple(name if is_remote(name) else str(recipe.scope.file(name)) for name in source.files)
    try:
        shards = shards_of(source, files)
    except UserError as error:
        raise UserError(f"{recipe.label}: sources: {source.name}: {error}") from error
    for shard in range(shards):
        part = HubShard(files, shard, shards)
        yield Unit(number, part.to_path(), f"{source.hub}@{shard}/{shards}", HUB, _LARGE, 0, 0)


def _file_units(
    recipe: Recipe, number: int, source: SourceSettings, left_out: LeftOut, on_error: str
) -> Iterator[Unit]:
    """The units of a source's ``files``, in their order, each file once."""
    seen, answers = set[str](), ask(source.files)
    for pattern in source.files:
        if is_remote(pattern):
            found = _remote_units(number, {one: answers[one] for one in expanded(pattern)}, left_out, on_error)
        else:
            found = _local_units(recipe, number, source, pattern, left_out, on_error)
        for unit in found:
            real = unit.path if unit.remote else os.path.realpath(unit.path)
            if real not in seen:
                seen.add(real)
                yield unit


def _remote_units(
    number: int, answers: Mapping[str, RemoteFile | UserError], left_out: LeftOut, on_error: str
) -> Iterator[Unit]:
    """The files behind addresses; ``answers`` are what their servers say."""
    for address, found in answers.items():
        if isinstance(found, UserError):
            if on_error == "fail":
                raise UserError(f"{found}; correct the address, or pass --on-error skip") from found
            left_out.add(address, f"cannot be read ({found})")
            continue
        reader = remote_reader(address, found)
        if reader is None:
            left_out.add(address, f"not text by its name or type ({found.content_type})")
        elif found.size == 0:
            left_out.add(address, "empty")
        else:
            yield Unit(number, address, address, reader, found.size or _LARGE, found.identity, 0)


def _local_units(
    recipe: Recipe, number: int, source: SourceSettings, pattern: str, left_out: LeftOut, on_error: str
) -> Iterator[Unit]:
    """The files that ``pattern`` means on this machine."""
    for path, name, named in _paths(recipe, source, pattern, left_out):
        try:
            unit = _unit(number, source, path, name, named, left_out)
        except (UserError, OSError) as error:
            reason = str(error).removeprefix("--input ").removeprefix(f"{path}: ")
            if on_error == "fail":
                raise UserError(f"{path}: {reason}; fix it, exclude it, or pass --on-error skip") from error
            left_out.add(name, f"cannot be read ({reason})")
            continue
        if unit is not None:
            yield unit


def _paths(recipe: Recipe, source: SourceSettings, pattern: str, left_out: LeftOut) -> Iterator[tuple[str, str, bool]]:
    """(path, name to show, whether the recipe names the file itself) of all that a pattern of ``files`` means."""
    base = str(recipe.scope.directory)
    if glob.has_magic(pattern) and not os.path.lexists(os.path.join(base, pattern)):
        matches = sorted(glob.glob(pattern, root_dir=base, recursive=True))
    else:
        matches = [pattern]
        if not os.path.exists(os.path.join(base, pattern)):
            raise UserError(f"{recipe.label}: sources: {source.name}: files: {pattern} does not exist")
    for match in matches:
        root = os.path.join(base, match)
        directory = os.path.isdir(root)
        for path, _ in walk(root, (*DEFAULT_EXCLUDES, *source.exclude), left_out):
            yield path, shown(match + path[len(root) :]), not directory


def _unit(number: int, source: SourceSettings, path: str, name: str, named: bool, left_out: LeftOut) -> Unit | None:
    """The unit of a file; None (and an entry in ``left_out``) where it is not for reading."""
    status = os.stat(path)
    kind = reader_for(path)
    if kind is None and named:
        kind = "lines" if text_format(path) is TextFormat.LINES else "text"
    if kind is None:
        left_out.add(name, "not text by its name")
        return None
    if not status.st_size:
        left_out.add(name, "empty")
        return None
    reader = reader_named(kind)
    if reader.whole and status.st_size > source.max_file_mb * _MIB and not named:
        left_out.add(name, f"larger than max_file_mb {source.max_file_mb:g}")
        return None
    with open(path, "rb"):
        places = reader.places(path, source)
    return Unit(number, path, name, kind, status.st_size, status.st_mtime_ns, places)


def plan_of(units: Sequence[Unit], partitions: Sequence[Sequence[Piece]]) -> dict[str, Any]:
    """Both as JSON."""
    return {
        "units": [list(dataclasses.astuple(unit)) for unit in units],
        "partitions": [[list(dataclasses.astuple(piece)) for piece in pieces] for pieces in partitions],
    }


def read_plan(value: dict[str, Any]) -> tuple[list[Unit], list[list[Piece]]]:
    """What :func:`plan_of` gave."""
    return (
        [Unit(*unit) for unit in value["units"]],
        [[Piece(*piece) for piece in pieces] for pieces in value["partitions"]],
    )
