"""Which checkpoint of a directory is the newest whole one? All ranks share the reading and agree on the answer."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megaforge.checkpoint.directory import is_step_directory, list_steps, quarantine, set_aside_names
from megaforge.checkpoint.foreign import MEGATRON_LATEST, conversion_of
from megaforge.checkpoint.hashed_file import HASH, FileRecord
from megaforge.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megaforge.errors import CheckpointError, DamagedCheckpointError, UserError
from megaforge.monitor.events import EventLog
from megaforge.parallel.agree import exchange, from_first_rank
from megaforge.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """Why a checkpoint is rejected; ``damaged`` when its bytes prove it, not merely a disk that did not answer."""

    text: str
    damaged: bool


def check_length(path: Path, record: FileRecord) -> Problem | None:
    """Whether ``path`` has the length that was written."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return Problem(f"{path.name} is missing", True)
    except OSError as error:
        return Problem(f"{path.name} cannot be read: {error}", False)
    return None if size == record.bytes else Problem(f"{path.name} has {size} bytes instead of {record.bytes}", True)


def check_file(path: Path, record: FileRecord) -> Problem | None:
    """Whether ``path`` has the length and hash that were taken while it was written."""
    problem = check_length(path, record)
    if problem is not None:
        return problem
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, HASH).hexdigest()
    except OSError as error:
        return Problem(f"{path.name} cannot be read: {error}", False)
    return None if digest == record.sha256 else Problem(f"{path.name} has been altered (its {HASH} differs)", True)


def _read_files(path: Path) -> tuple[Mapping[str, FileRecord], Problem | None]:
    try:
        return read_manifest(path).files, None
    except DamagedCheckpointError as error:
        return {}, Problem(str(error), True)
    except CheckpointError as error:
        return {}, Problem(str(error), False)
    except OSError as error:
        return {}, Problem(f"{MANIFEST_FILE} cannot be read: {error}", False)


def _share(files: Mapping[str, FileRecord], ctx: ParallelContext) -> list[str]:
    """The files this rank checks: all of them once over the ranks, large ones spread."""
    if ctx.control is None:
        return sorted(files)
    ordered = sorted(files, key=lambda name: (-files[name].bytes, name))
    return ordered[ctx.world.rank :: ctx.world.size]


def verify_checkpoint(path: Path, ctx: ParallelContext) -> Problem | None:
    """Checks the manifest and every file's length and hash, each file on one rank; all ranks return the same.

    A defect that another rank reports counts as damage only when rank 0 sees it too: a directory that is not shared
    looks damaged to everybody else.
    """
    files, problem = from_first_rank(ctx, lambda: _read_files(path))
    if problem is None:
        found = [(name, check_file(path / name, files[name])) for name in _share(files, ctx)]
        reports = [
            (rank, name, report)
            for rank, checked in enumerate(exchange(ctx, found))
            for name, report in checked
            if report is not None
        ]
        problem = from_first_rank(ctx, lambda: _confirm(path, files, reports)) if reports else None
    return problem


def _confirm(path: Path, files: Mapping[str, FileRecord], reports: list[tuple[int, str, Problem]]) -> Problem:
    """Rank 0's opinion of what the ranks reported about ``path``."""
    rank, name, report = reports[0]
    if not path.is_dir():
        return Problem("it was removed meanwhile", False)
    own = report if rank == 0 else check_file(path / name, files[name])
    if own is None:
        return Problem(
            f"rank {rank}: {report.text}; rank 0 finds it whole, so this directory is not the same for all ranks", False
        )
    return own


def holds_no_checkpoint(directory: str | Path, ctx: ParallelContext) -> bool:
    """Whether no run has left anything below ``directory``, not even a checkpoint that was set aside: it is missing,
    empty, or holds other things, such as what a run left that was killed during its first save. Collective."""
    directory = Path(directory)

    def nothing() -> bool:
        if not directory.exists():
            return True
        if not directory.is_dir() or is_step_directory(directory) or (directory / MANIFEST_FILE).exists():
            return False
        return not list_steps(directory) and not set_aside_names(directory)

    return from_first_rank(ctx, nothing)


def holds_other_program(directory: str | Path, ctx: ParallelContext) -> bool:
    """Whether ``directory`` has what another program keeps a model in: Megatron-LM's mark, or published weights.
    Collective."""
    directory = Path(directory)

    def other() -> bool:
        marks = ("latest_checkpointed_iteration.txt", "common.pt", "config.json", "*.safetensors", "*.pth")
        return directory.is_dir() and any(next(directory.glob(mark), None) for mark in marks)

    return from_first_rank(ctx, other)


def find_checkpoint(
    directory: str | Path, ctx: ParallelContext, *, quarantine_damaged: bool = False, events: EventLog | None = None
) -> Path:
    """The newest checkpoint below ``directory`` that verifies, or ``directory`` itself when it is one checkpoint.

    Collective. Damaged ones are skipped with a warning on rank 0 and, with ``quarantine_damaged``, renamed to
    ``NAME.damaged`` where the medium can be written: for the run alone that will save there; ``events`` are told.

    Raises:
        UserError: there is no such directory, or no checkpoint in it verifies; the text says what is there.
    """
    directory = Path(directory)
    candidates = from_first_rank(ctx, lambda: _candidates(directory))
    if candidates == [directory]:
        problem = verify_checkpoint(directory, ctx)
        if problem is not None:
            raise UserError(
                f"--load {directory}: this checkpoint is unusable: {problem.text}; "
                f"name another, or {directory.parent} for the newest valid one"
            )
        return directory
    rejected: list[str] = []
    for path in candidates:
        problem = verify_checkpoint(path, ctx)
        if problem is None:
            return path
        rejected.append(f"{path.name} ({problem.text})")
        if ctx.is_first_rank:
            moved = quarantine(path) if quarantine_damaged and problem.damaged else None
            if events is not None:
                events.tell("rejected", path=path.name, problem=problem.text, renamed=moved.name if moved else None)
            logger.warning(
                "checkpoint %s is unusable: %s%s; trying the one before it",
                path,
                problem.text,
                f"; renamed to {moved.name}" if moved else "",
            )
    raise UserError(f"--load {directory}: none of its checkpoints is valid: {'; '.join(rejected)}")


def _has_steps(directory: Path) -> bool:
    return directory.is_dir() and bool(list_steps(directory))


def _candidates(directory: Path) -> list[Path]:
    if (conversion := conversion_of(directory)) is not None and not _has_steps(directory):
        raise UserError(f"--load {directory}: {conversion}")
    if not directory.is_dir():
        if directory.is_file():
            raise UserError(
                f"--load {directory}: is a file, not a directory of checkpoints; a converted one becomes a directory "
                f"by tools/convert_checkpoint.py --load {directory} --save DIR"
            )
        raise UserError(f"--load {directory}: does not exist; name the directory that a run was given as --save")
    if is_step_directory(directory) or (directory / MANIFEST_FILE).exists():
        return [directory]
    candidates = [path for _, path in list_steps(directory)]
    if candidates and (directory / MEGATRON_LATEST).exists():
        raise UserError(
            f"--load {directory}: two programs have left checkpoints there, as both {candidates[0].name} and "
            f"{MEGATRON_LATEST} say; name one of ours ({candidates[0]}), or move the other program's away"
        )
    if not candidates:
        names = sorted(path.name for path in directory.iterdir())
        there = "; it holds " + ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "; it is empty"
        remedy = "name the directory that a run was given as --save"
        if set_aside := [name for name in names if re.match(r"step_\d+\.(damaged|abandoned)", name)]:
            remedy = f"{len(set_aside)} set aside there as damaged or abandoned; to start anew, name a new directory"
        raise UserError(f"--load {directory}: no checkpoint (step_N) in it{there}; {remedy}")
    return candidates
