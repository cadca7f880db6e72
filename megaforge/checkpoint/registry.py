"""The checkpoints of a run: what each is, and whether it is whole. Only reads; renames and deletes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.checkpoint.boxes import box_of, coverage_error
from megaforge.checkpoint.directory import LATEST_FILE, is_step_directory, list_steps, set_aside_names
from megaforge.checkpoint.find import Problem, check_file, check_length
from megaforge.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.checkpoint.sealed import open_tensors, unlocked
from megaforge.checkpoint.shards import chunk_name
from megaforge.errors import CheckpointError, DamagedCheckpointError, UserError


class Listed(NamedTuple):
    """One checkpoint.

    Attributes:
        name: of its directory.
        step: iteration; None where its manifest cannot be read, as the other fields then.
        written: when, in seconds since 1970.
        bytes: of all its files of tensors.
        layout: as ``tp 2, pp 2, dp 4``; axes of size one are left out.
        metric: its score, lower is better, or None.
        problem: what is wrong with it, or None.
    """

    name: str
    step: int | None
    written: float | None
    bytes: int | None
    layout: str | None
    metric: float | None
    problem: str | None


def checkpoints_in(directory: str | Path) -> list[Path]:
    """The checkpoints of a run's directory, newest first, then those set aside; or ``directory``, where it is one.

    Raises:
        UserError: there is none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name what a run was given as --save, or one step_N in it")
    if is_step_directory(directory) or (directory / MANIFEST_FILE).exists():
        return [directory]
    found = [path for _, path in list_steps(directory)]
    found += [directory / name for name in set_aside_names(directory)]
    if not found:
        raise UserError(f"{directory}: no checkpoint (step_N) in it; name what a run was given as --save")
    return found


def list_checkpoints(directory: str | Path) -> Iterator[Listed]:
    """What each checkpoint of ``directory`` says of itself; the lengths of its files are looked at, not their content.

    Raises:
        UserError: there is none.
    """
    for path in checkpoints_in(directory):
        try:
            manifest = read_manifest(path)
            checked = (check_length(path / name, record) for name, record in manifest.files.items())
            yield _listed(path, manifest, next(filter(None, checked), None))
        except (CheckpointError, OSError) as error:
            yield Listed(path.name, None, None, None, None, None, str(error))


def verify_checkpoints(directory: str | Path) -> Iterator[Listed]:
    """As :func:`list_checkpoints`, with every byte of every file read, and every element of every tensor accounted for.

    Raises:
        UserError: there is none.
    """
    for path in checkpoints_in(directory):
        try:
            manifest = read_manifest(path)
            checked = (check_file(path / name, record) for name, record in manifest.files.items())
            problem = next(filter(None, checked), None)
            yield _listed(path, manifest, problem or check_contents(path, unlocked(path, manifest)))
        except (CheckpointError, OSError) as error:
            yield Listed(path.name, None, None, None, None, None, str(error))


def check_contents(path: Path, manifest: Manifest) -> Problem | None:
    """Whether the pieces that ``manifest``, unlocked, lists are in the files, and make up each tensor exactly once."""
    slots: dict[str, Mapping[str, tuple[tuple[int, ...], str]]] = {}
    for key, record in manifest.tensors.items():
        boxes = [box_of(chunk.offsets, chunk.sizes) for chunk in record.chunks]
        problem = coverage_error(box_of([0] * len(record.shape), record.shape), boxes)
        if problem:
            return Problem(f"{key}: {problem}", True)
        for chunk in record.chunks:
            if chunk.file not in slots:
                try:
                    slots[chunk.file] = _slots(open_tensors(path, chunk.file, manifest))
                except DamagedCheckpointError as error:
                    return Problem(str(error), True)
            name = chunk_name(key, chunk.offsets, chunk.sizes, record.shape)
            if slots[chunk.file].get(name) != (chunk.sizes, record.dtype):
                return Problem(f"{chunk.file} holds no {name} of {record.dtype} {chunk.sizes}", True)
    return None


def _slots(file: SafetensorsFile) -> dict[str, tuple[tuple[int, ...], str]]:
    return {slot.name: (slot.shape, slot.dtype_name) for slot in file.slots()}


def _listed(path: Path, manifest: Manifest, problem: Problem | None) -> Listed:
    axes = ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items() if size > 1 and axis != "world")
    return Listed(
        path.name,
        manifest.step,
        (path / MANIFEST_FILE).stat().st_mtime,
        sum(record.bytes for record in manifest.files.values()),
        axes or "one rank",
        manifest.metric,
        None if problem is None else problem.text,
    )


def table(rows: list[Listed], directory: str | Path, whole: str) -> list[str]:
    """``rows`` for people: a header and one line a checkpoint.

    Args:
        whole: what is said of one without a problem.
    """
    hint = Path(directory) / LATEST_FILE
    newest = hint.read_text(encoding="utf-8", errors="replace").strip() if hint.is_file() else None
    header = ["checkpoint", "written", "bytes", "layout", "score", "state"]
    cells = [header] + [_cells(row, row.name == newest, whole) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: Listed, newest: bool, whole: str) -> list[str]:
    written = "?" if row.written is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.written))
    size = "?" if row.bytes is None else f"{row.bytes:,}"
    score = "-" if row.metric is None else f"{row.metric:.6g}"
    state = row.problem or whole + (" (latest)" if newest else "")
    return [row.name, written, size, row.layout or "?", score, state]


def as_json(row: Listed) -> dict[str, Any]:
    """``row`` for programs."""
    return dict(row._asdict())
