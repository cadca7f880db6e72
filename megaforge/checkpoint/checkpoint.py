"""Saving and loading a run's state at any layout. A save has three parts: a snapshot is taken, written, published."""

from __future__ import annotations

import json
import logging
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from megaforge.checkpoint import directory as directories
from megaforge.checkpoint.directory import (
    Retention,
    abandon_later,
    discard_temporary,
    excess_checkpoints,
    list_steps,
    quarantine,
    remove_checkpoint,
)
from megaforge.checkpoint.encryption import Key, Seal
from megaforge.checkpoint.find import Problem, check_length, verify_checkpoint
from megaforge.checkpoint.manifest import Manifest, read_manifest
from megaforge.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner
from megaforge.checkpoint.sealed import unlocked
from megaforge.checkpoint.shards import RANK_PREFIX, Shard, build_shards
from megaforge.checkpoint.storage import CheckpointHead, CheckpointReader, CheckpointWriter
from megaforge.errors import CheckpointError, UserError
from megaforge.fault_points import reach
from megaforge.parallel.agree import describe_failures, from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry

logger = logging.getLogger(__name__)


def layout_of(ctx: ParallelContext, chunks: int = 1) -> dict[str, int]:
    """Sizes of the parallel axes and of the world, and the pipeline stages of a rank (``vpp``): when they agree, rank r
    is the same rank as before, of the dense layers and of the experts."""
    axes = {name: ctx.axis(name).size for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp", "world")}
    return axes | {"vpp": chunks}


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint will hold, of this rank. Its pieces are views of live memory: it must be written before the
    next step changes them."""

    head: CheckpointHead
    shards: dict[str, Shard]


def save_checkpoint(
    directory: str | Path,
    step: int,
    entries: Iterable[Entry],
    meta: dict[str, Any],
    ctx: ParallelContext,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    metric: float | None = None,
    chunks: int = 1,
    goes_on_from: int | None = None,
    key: Key | None = None,
) -> Path:
    """Takes a snapshot, writes it below ``directory`` and publishes it as the checkpoint of ``step``. Collective.

    Args:
        entries: the tensors, with this rank's part of each; replicated ones are written by one of their holders.
        meta: JSON values; rank 0's are kept.
        rank_tensors: tensors that belong to this rank alone (random states); see :func:`load_checkpoint`.
        metric: this checkpoint's score, lower is better (negate an accuracy), or None.
        chunks: pipeline stages that this rank holds.
        goes_on_from: the step of this run's newest checkpoint there (0: none yet). Later ones are of another run, or of
            a past that this one went back behind: they are set aside as ``NAME.abandoned``, and rank 0 says so. None
            sets nothing aside.
        key: encrypts it; every rank has the same one.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: on every rank, when any rank failed (disk full, ...); earlier checkpoints are untouched.
    """
    snapshot = take_snapshot(step, entries, meta, ctx, rank_tensors, metric=metric, chunks=chunks, key=key)
    return save_snapshot(snapshot, Path(directory), ctx, goes_on_from=goes_on_from)


def save_snapshot(
    snapshot: Snapshot, directory: Path, ctx: ParallelContext, *, goes_on_from: int | None = None
) -> Path:
    """All of :func:`save_checkpoint` but the first part. Collective."""
    if goes_on_from is not None:
        from_first_rank(ctx, lambda: _abandon_later(directory, goes_on_from))
    return publish_snapshot(write_snapshot(snapshot, directory, ctx), directory, snapshot.head.step, ctx)


def take_snapshot(
    step: int,
    entries: Iterable[Entry],
    meta: dict[str, Any],
    ctx: ParallelContext,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    metric: float | None = None,
    chunks: int = 1,
    key: Key | None = None,
) -> Snapshot:
    """The first part of :func:`save_checkpoint`: what is to be saved, checked on every rank. Collective."""
    shards = together(ctx, lambda: build_shards(entries, rank_tensors or {}, ctx))
    name = from_first_rank(ctx, lambda: (json.dumps(meta), secrets.token_hex(16))[1])
    seal = None if key is None else Seal.new(key, name)
    return Snapshot(CheckpointHead(step, layout_of(ctx, chunks), meta, metric, seal), shards)


def write_snapshot(snapshot: Snapshot, directory: Path, ctx: ParallelContext) -> Manifest | None:
    """The second part: every rank's file, written and synced in a temporary directory. Collective.

    Returns:
        On rank 0, what the files hold.
    """
    step = snapshot.head.step
    writer = CheckpointWriter(directory, snapshot.head, ctx.world.rank)
    try:
        _quieten()
        state_dict_saver.save(
            snapshot.shards,
            storage_writer=writer,
            planner=ShardSavePlanner(),
            process_group=ctx.control,
            no_dist=ctx.control is None,
        )
    except CheckpointException as error:
        if ctx.is_first_rank or ctx.control is None:
            discard_temporary(directory, step)
        raise _translate(error, _not_written(directory, step)) from error
    return writer.manifest


def publish_snapshot(manifest: Manifest | None, directory: Path, step: int, ctx: ParallelContext) -> Path:
    """The last part: the temporary directory becomes the checkpoint, which is there and whole or not there.
    Collective."""

    def publish() -> Path:
        assert manifest is not None
        try:
            return directories.commit(directory, manifest)
        except OSError as error:
            raise CheckpointError(f"{_not_written(directory, step)}: {error}") from error
        finally:
            discard_temporary(directory, step)  # nothing, where it has become the checkpoint

    return from_first_rank(ctx, publish)


def _not_written(directory: Path, step: int) -> str:
    return f"--save {directory}: the checkpoint of step {step} was not written, earlier ones stay valid"


def _abandon_later(directory: Path, step: int) -> None:
    if not directory.is_dir():
        return
    try:
        moved = abandon_later(directory, step)
    except OSError as error:
        raise CheckpointError(
            f"--save {directory}: the checkpoints after step {step}, which this run goes on from, cannot be set aside "
            f"({error.strerror}); nothing was saved"
        ) from error
    if moved:
        logger.warning(
            "--save %s: this run goes on from step %d, so the later checkpoints there are not part of it; "
            "set aside, not deleted: %s",
            directory,
            step,
            ", ".join(path.name for path in moved),
        )


def enforce_retention(newest: Path, ctx: ParallelContext, keep: Retention) -> list[Path]:
    """Removes the checkpoints beside ``newest``, just published, that need not be kept. Where none stays beside it, its
    files are read back first: the last checkpoint that is known to be whole never goes. Collective.

    Returns:
        What was removed.

    Raises:
        CheckpointError: the files of the newest are not as long as they were written, or not what was; nothing is
            removed then.
    """
    excess, alone = from_first_rank(ctx, lambda: _may_go(newest, keep))
    if not excess:
        return []
    problem = verify_checkpoint(newest, ctx) if alone else from_first_rank(ctx, lambda: _check_lengths(newest))

    def remove() -> None:
        if problem is not None:
            if problem.damaged:
                _ = quarantine(newest)
            raise CheckpointError(
                f"--save {newest.parent}: {newest.name} does not read back as written: {problem.text}; older ones are "
                "kept"
            )
        for path in excess:
            remove_checkpoint(path)

    from_first_rank(ctx, remove)
    return excess


def _may_go(newest: Path, keep: Retention) -> tuple[list[Path], bool]:
    """The checkpoints beside ``newest`` that need not be kept, and whether those are all."""
    excess = excess_checkpoints(newest.parent, keep, newest)
    return excess, len(excess) + 1 >= len(list_steps(newest.parent))


def _check_lengths(path: Path) -> Problem | None:
    checked = (check_length(path / name, record) for name, record in read_manifest(path).files.items())
    return next(filter(None, checked), None)


def load_checkpoint(
    path: str | Path,
    entries: Iterable[Entry],
    ctx: ParallelContext,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    chunks: int = 1,
    verify: bool = True,
    allow_extra: tuple[str, ...] = (),
    cast: bool = False,
    fetch: Callable[[set[str]], None] | None = None,
) -> dict[str, Any]:
    """Fills ``entries`` in place from the checkpoint ``path``, whatever layout wrote it. Collective.

    Args:
        path: one checkpoint, as :func:`megaforge.checkpoint.find.find_checkpoint` returns it.
        entries: the tensors to fill; each of their elements must be in the checkpoint exactly once.
        rank_tensors: this rank's own tensors to fill; they are left alone, with a warning on rank 0, when the
            checkpoint was written at another layout, where "the same rank" has no meaning, or has none (a converted
            one).
        chunks: pipeline stages that this rank holds.
        verify: check every file's hash first; False when ``find_checkpoint`` has just done so.
        allow_extra: prefixes of keys in the checkpoint that may go unread (``("optimizer.",)``; ``("",)``: any).
        cast: convert element types that differ instead of refusing them.
        fetch: brings the files of these names to ``path`` where they are elsewhere. Collective.

    Returns:
        The ``meta`` that was saved.

    Raises:
        CheckpointError: on every rank: damaged, or a tensor is missing, left over, or of another shape or type.
    """
    path = Path(path)
    if verify:
        problem = verify_checkpoint(path, ctx)
        if problem is not None:
            raise CheckpointError(f"--load {path}: this checkpoint is unusable: {problem.text}")
    manifest = together(ctx, lambda: unlocked(path, read_manifest(path)))
    why = _why_ranks_differ(manifest, ctx, chunks)
    if rank_tensors and why and ctx.is_first_rank:
        logger.warning("%s %s: the ranks' own tensors (random states) start afresh", path, why)
    shards = together(ctx, lambda: build_shards(entries, {} if why else rank_tensors or {}, ctx))
    reach("load", path=path)
    try:
        _quieten()
        state_dict_loader.load(
            shards,
            storage_reader=CheckpointReader(path, manifest, fetch),
            planner=ShardLoadPlanner(allow_extra, cast),
            process_group=ctx.control,
            no_dist=ctx.control is None,
        )
    except CheckpointException as error:
        raise _translate(error, f"--load {path}") from error
    return manifest.meta


def _layouts(there: Mapping[str, int], here: Mapping[str, int]) -> str | None:
    """The axes whose size is another one, of the experts only where the others agree; None where all agree. An older
    checkpoint does not name all of them, and one that is unknown here has one rank."""
    other = [name for name, size in there.items() if size != here.get(name, 1)]
    for left_out in (("etp", "edp", "world"), ("world",), ()):
        if named := [name for name in other if name not in left_out]:
            before = ", ".join(f"{name} {there[name]}" for name in named)
            return f"was written at {before}, this run is {', '.join(f'{name} {here.get(name, 1)}' for name in named)}"
    return None


def _why_ranks_differ(manifest: Manifest, ctx: ParallelContext, chunks: int = 1) -> str | None:
    """Why no rank here can take what a rank there kept for itself; None when it can."""
    if other := _layouts(manifest.layout, layout_of(ctx, chunks)):
        return other
    if not any(key.startswith(RANK_PREFIX) for key in manifest.tensors):
        return "was not written by the ranks of a run"
    return None


def read_meta(path: str | Path) -> dict[str, Any]:
    """The ``meta`` of the checkpoint ``path``; reads the manifest alone and is not a collective.

    Raises:
        CheckpointError: the manifest is missing, altered or of another format.
    """
    return read_manifest(Path(path)).meta


def _translate(error: CheckpointException, text: str) -> Exception:
    """One error for every rank of what the ranks reported: the user's mistake, or a fault with its traceback."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    interrupt = next((cause for cause in causes.values() if not isinstance(cause, Exception)), None)
    if interrupt is not None:
        raise interrupt
    if all(isinstance(cause, (UserError, OSError)) for cause in causes.values()):
        return CheckpointError(f"{text}: {describe_failures({rank: str(cause) for rank, cause in causes.items()})}")
    return RuntimeError(f"{text}: {error}")


def _quieten() -> None:
    """Without torch's warning that a single process saves or loads by itself: that is what was asked for. Filters are
    the process's, and a thread that took this one back would take back another thread's."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
