"""What a run's memory has given up, in a file: one JSON object a line, ``{"iteration", "uses", "tokens", "key"}``, the
key as base64 of its fp32 numbers (little-endian)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaforge.durable import set_aside, sync_path
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.reasoning.memory.episodic import Entry, EpisodicIndex

_FLAG = "--agent-memory-archive"


def append(path: Path, iteration: int, entries: Sequence[Entry]) -> None:
    """Adds entries that were given up after ``iteration``; the disk has them when this returns.

    Raises:
        UserError: it cannot be written.
    """
    lines = [
        json.dumps(
            {
                "iteration": iteration,
                "uses": one.uses,
                "tokens": list(one.tokens),
                "key": base64.b64encode(one.key.numpy().astype("<f4").tobytes()).decode("ascii"),
            }
        )
        for one in entries
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        sync_path(path)
        if new:
            sync_path(path.parent)  # which has its name
    except OSError as error:
        raise UserError(f"{_FLAG} {path}: it cannot be written ({error.strerror})") from error


def go_back(path: Path, iteration: int) -> str | None:
    """Leaves in ``path`` what was given up until ``iteration``, where the run goes on: what follows is moved to
    ``PATH.abandoned``, and a last line that a kill cut short goes. Returns what to tell the user, or None.

    Raises:
        UserError: it is not an archive, and is left as it is; or it cannot be written.
    """
    if not path.exists():
        return None
    ends, kept = [0], 0
    for row, size in _rows(path):
        kept += kept == len(ends) - 1 and row.iteration <= iteration
        ends.append(ends[-1] + size)
    try:
        set_aside(path, ends[kept], ends[-1])
    except OSError as error:
        raise UserError(f"{_FLAG} {path}: it cannot be written ({error.strerror})") from error
    if moved := len(ends) - 1 - kept:
        return (
            f"{_FLAG} {path}: {moved} chunks that were given up after iteration {iteration}, where this run goes on, "
            f"were moved to {path}.abandoned"
        )
    return None


def read_archive(path: Path, dim: int, search: str = "torch") -> EpisodicIndex:
    """An index of all that is in an archive.

    Args:
        dim: S, of keys.

    Raises:
        UserError: it cannot be read, is not an archive, or its keys are of another size.
    """
    if not path.exists():
        raise UserError(f"{_FLAG} {path}: there is no such file")
    rows = [row for row, _ in _rows(path)]
    index = EpisodicIndex(dim, max(len(rows), 1), search)
    for row in rows:
        if len(row.key) != dim:
            raise UserError(f"{_FLAG} {path}: its keys are of size {len(row.key)}, and this model's memory has {dim}")
        index.write(row.key, row.tokens)
    return index


class _Row(NamedTuple):
    iteration: int
    tokens: tuple[int, ...]
    key: Tensor


def _rows(path: Path) -> Iterator[tuple[_Row, int]]:
    """What each line says, and its bytes. A last line without its end is none."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n") or not _cut_short(line):
                    yield _row(path, number, line), len(line)
    except OSError as error:
        raise UserError(f"{_FLAG} {path}: it cannot be read ({error.strerror})") from error


_HEAD = b'{"iteration": '


def _cut_short(line: bytes) -> bool:
    return line.startswith(_HEAD) or _HEAD.startswith(line)


def _row(path: Path, number: int, line: bytes) -> _Row:
    try:
        record = parse_json(line)
        key = np.frombuffer(base64.b64decode(record["key"], validate=True), "<f4")
        row = _Row(int(record["iteration"]), tuple(map(int, record["tokens"])), torch.from_numpy(key.copy()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{_FLAG} {path}: line {number} is not a chunk that a run gave up, so the file is left alone; name another"
        ) from error
    return row
