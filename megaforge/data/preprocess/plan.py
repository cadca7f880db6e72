"""What a preprocessing run will do: its settings, its sources, and the shards that its workers own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.jsonl import is_compressed
from megaforge.data.text.formats import TextFormat, text_format
from megaforge.data.text.readers import open_text
from megaforge.data.tokenizer import TOKENIZER_TYPES
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json

_EDGE = 1 << 20
_MIN_SHARD, _MAX_SHARD, _SHARDS = 8 << 20, 256 << 20, 64
_EXPANSION = 4  # decompressed over compressed bytes of text, as gzip and Zstandard give it


@dataclass(frozen=True)
class PreprocessSettings:
    """The flags of ``tools/preprocess_data.py``."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    eod_token: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    on_error: str = "fail"
    workers: int = 1
    shard_mb: int | None = None
    fast: bool = True
    force: bool = False

    def validate(self) -> None:
        """Raises UserError where a flag alone is wrong."""
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 is needed")
        if self.shard_mb is not None and self.shard_mb < 1:
            raise UserError(f"--shard-mb {self.shard_mb}: at least 1 is needed")
        if self.on_error not in ("fail", "skip"):
            raise UserError(f"--on-error {self.on_error}: choose fail or skip")
        if self.tokenizer_type not in TOKENIZER_TYPES:
            raise UserError(f"--tokenizer-type {self.tokenizer_type}: choose one of {', '.join(TOKENIZER_TYPES)}")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise UserError(f"--json-keys {' '.join(self.json_keys)}: give each key once")


@dataclass(frozen=True)
class Source:
    """One input file as it was when the run began; ``edges`` is the SHA-256 of its first and last MiB."""

    path: str
    bytes: int
    modified_ns: int
    edges: str
    lines: bool = True  # whether it may be cut between lines; otherwise it is one document, or rows
    rows: int = 0  # of a table, which may be cut between them

    @classmethod
    def of(cls, path: str, key: str) -> Source:
        """Looks at the file, a table's column ``key`` included.

        Raises:
            UserError: it is missing, cannot be read, or holds no text.
        """
        form = text_format(path)
        with open_text(path, key) as reader:
            rows = reader.count_records(sys.maxsize) if form.is_table else 0
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest = hashlib.sha256(file.read(_EDGE))
                file.seek(max(0, status.st_size - _EDGE))
                digest.update(file.read(_EDGE))
        except OSError as error:
            raise UserError(f"--input {path}: {error.strerror}") from error
        return cls(path, status.st_size, status.st_mtime_ns, digest.hexdigest(), form is TextFormat.LINES, rows)


@dataclass(frozen=True)
class Shard:
    """A unit of work that is kept once finished: the lines that begin in ranges (source, start, stop) of the input.

    ``open_ended`` shards cut a compressed file, whose length is unknown: they go on until one meets its end.
    """

    name: str
    segments: tuple[tuple[int, int, int | None], ...]
    open_ended: bool = False

    def to_json(self) -> dict[str, Any]:
        """The shard as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Shard:
        """The shard from :meth:`to_json`."""
        segments = tuple((int(s), int(a), None if b is None else int(b)) for s, a, b in value["segments"])
        return cls(str(value["name"]), segments, bool(value["open_ended"]))


def shard_bytes(sources: Sequence[Source], shard_mb: int | None) -> int:
    """Bytes of input to a shard: the flag, or 1/64 of the input within 8 to 256 MiB. Never a function of the workers,
    so that a killed run continues with any number of them."""
    if shard_mb is not None:
        return shard_mb << 20
    total = sum(_expected_bytes(source) for source in sources)
    return min(max(_MIN_SHARD, -(-total // _SHARDS)), _MAX_SHARD)


def cut_into_shards(sources: Sequence[Source], size: int) -> list[list[Shard]]:
    """The shards in input order, in groups: a group is a list of known shards, or the first of an open-ended series.

    Small files share a shard; a large plain file is cut into ranges of bytes, or of rows; a large compressed file is
    an open-ended series, to be continued with :func:`successor`.
    """
    groups: list[list[Shard]] = []
    small: list[tuple[int, int, int | None]] = []
    filled = 0
    for number, source in enumerate(sources):
        expected = _expected_bytes(source)
        if small and filled + expected > size:
            groups.append([Shard(f"s{small[0][0]:06d}-000000", tuple(small))])
            small, filled = [], 0
        if expected <= size or not (source.lines or source.rows):
            small.append((number, 0, None))
            filled += expected
        elif is_compressed(source.path) and not source.rows:
            groups.append([Shard(f"s{number:06d}-000000", ((number, 0, size),), open_ended=True)])
        else:
            places = source.rows or source.bytes
            cuts = [*range(0, places, max(1, places * size // expected))]
            stops: list[int | None] = [*cuts[1:], None]
            ranges = enumerate(zip(cuts, stops, strict=True))
            groups.append([Shard(f"s{number:06d}-{k:06d}", ((number, a, b),)) for k, (a, b) in ranges])
    if small:
        groups.append([Shard(f"s{small[0][0]:06d}-000000", tuple(small))])
    return groups


def successor(shard: Shard, steps: int = 1) -> Shard:
    """The shard ``steps`` further on in an open-ended series."""
    ((source, start, stop),) = shard.segments
    assert shard.open_ended and stop is not None
    size, number = stop - start, int(shard.name[-6:]) + steps
    return Shard(f"s{source:06d}-{number:06d}", ((source, start + steps * size, stop + steps * size),), open_ended=True)


class ShardQueue:
    """Hands out the shards of one rank of ``size``, in input order; shards are dealt to the ranks in turn."""

    def __init__(self, groups: Sequence[Sequence[Shard]], rank: int, size: int) -> None:
        self._ended: set[int] = set()
        self._shards = self._deal(groups, rank, size)

    def next(self) -> Shard | None:
        """The next shard to work on, or None when all are given out."""
        return next(self._shards, None)

    def finished(self, shard: Shard, end: bool) -> None:
        """Takes note that a shard is done and whether it found the end of its (compressed) source."""
        if shard.open_ended and end:
            self._ended.add(shard.segments[0][0])

    def _deal(self, groups: Sequence[Sequence[Shard]], rank: int, size: int) -> Iterator[Shard]:
        dealt = 0
        for group in groups:
            for shard in group:
                offset = (rank - dealt) % size
                if shard.open_ended:
                    shard = successor(shard, offset)
                    while shard.segments[0][0] not in self._ended:
                        yield shard
                        shard = successor(shard, size)
                elif offset == 0:
                    yield shard
                dealt += 1


@dataclass(frozen=True)
class WorkDirectory:
    """``PREFIX_KEY_document.partial/``: the finished shards of a run that has not been published."""

    path: Path

    def prefix(self, shard: Shard) -> Path:
        """The dataset prefix of a shard."""
        return self.path / shard.name

    def manifest(self, shard: Shard) -> Path:
        """The description of a finished shard; it is written last."""
        return self.path / f"{shard.name}.manifest.json"

    def is_for(self, identity: dict[str, Any]) -> bool:
        """Whether it is of a run with this ``identity`` that has not ended."""
        return bool(_load_json(self.path / "plan.json") == identity)

    def prepare(self, identity: dict[str, Any]) -> None:
        """Makes the directory ready for a run; shards of a run with another ``identity`` are removed.

        Raises:
            UserError: it cannot be written.
        """
        marker = self.path / "plan.json"
        try:
            self.path.mkdir(exist_ok=True)
            if _load_json(marker) != identity:
                self.clear()
                write_json(marker, identity)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --output-prefix") from error

    def clear(self) -> None:
        """Removes every file but the lock."""
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A finished shard's manifest, or None where there is none or a killed process left half of one."""
    value = _load_json(path)
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: object) -> None:
    """Writes JSON durably and atomically."""
    with replacing(path, f"{path}.tmp-{os.getpid()}") as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def _load_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _expected_bytes(source: Source) -> int:
    return source.bytes * (_EXPANSION if source.rows or is_compressed(source.path) else 1)
