"""Saving and loading a run's state at any layout: the two functions that trainers and tools call."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from megaforge.checkpoint.directory import (
    abandon_later,
    discard_temporary,
    excess_checkpoints,
    quarantine,
    remove_checkpoint,
    step_name,
)
from megaforge.checkpoint.find import verify_checkpoint
from megaforge.checkpoint.manifest import Manifest, read_manifest
from megaforge.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner
from megaforge.checkpoint.shards import RANK_PREFIX, Entry, build_shards
from megaforge.checkpoint.storage import CheckpointHead, CheckpointReader, CheckpointWriter
from megaforge.errors import CheckpointError, UserError
from megaforge.parallel.agree import describe_failures, from_first_rank, together
from megaforge.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


def layout_of(ctx: ParallelContext) -> dict[str, int]:
    """Sizes of the parallel axes and of the world: when they agree, rank r is the same rank as before, of the dense
    layers and of the experts."""
    return {name: ctx.axis(name).size for name in ("tp", "cp", "pp", "dp", "ep", "etp", "edp", "world")}


def save_checkpoint(
    directory: str | Path,
    step: int,
    entries: Iterable[Entry],
    meta: dict[str, Any],
    ctx: ParallelContext,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    keep_last: int = 0,
    keep_best: int = 0,
    metric: float | None = None,
    goes_on_from: int | None = None,
) -> Path:
    """Writes the checkpoint of ``step`` below ``directory`` and removes those that need not be kept. Collective.

    Args:
        entries: the tensors, with this rank's part of each; replicated ones are written by one of their holders.
        meta: JSON values; rank 0's are kept.
        rank_tensors: tensors that belong to this rank alone (random states); see :func:`load_checkpoint`.
        keep_last: checkpoints to keep, newest first; 0 keeps all.
        keep_best: further ones to keep, lowest ``metric`` first.
        metric: this checkpoint's score, lower is better (negate an accuracy), or None.
        goes_on_from: the step of this run's newest checkpoint there (0: none yet). Later ones are of another run, or of
            a past that this one went back behind: they are set aside as ``NAME.abandoned``, and rank 0 says so. None
            sets nothing aside.

    Returns:
        The committed directory.

    Raises:
        CheckpointError: on every rank, when any rank failed (disk full, ...); earlier checkpoints are untouched.
    """
    directory = Path(directory)
    shards = build_shards_together(entries, rank_tensors, ctx)
    from_first_rank(ctx, lambda: json.dumps(meta))
    if goes_on_from is not None:
        from_first_rank(ctx, lambda: _abandon_later(directory, goes_on_from))
    writer = CheckpointWriter(directory, CheckpointHead(step, layout_of(ctx), meta, metric), ctx.world.rank)
    try:
        with _quiet():
            state_dict_saver.save(
                shards,
                storage_writer=writer,
                planner=ShardSavePlanner(),
                process_group=ctx.control,
                no_dist=ctx.control is None,
            )
    except CheckpointException as error:
        if ctx.is_first_rank or ctx.control is None:
            discard_temporary(directory, step)
        text = f"--save {directory}: the checkpoint of step {step} was not written, earlier ones stay valid"
        raise _translate(error, text) from error
    path = directory / step_name(step)
    _enforce_retention(directory, path, ctx, keep_last, keep_best)
    return path


def build_shards_together(
    entries: Iterable[Entry], rank_tensors: Mapping[str, torch.Tensor] | None, ctx: ParallelContext
) -> dict[str, Any]:
    """:func:`build_shards`, whose mistakes on one rank are raised on every rank."""
    own: dict[str, Any] = {}
    together(ctx, lambda: own.update(build_shards(entries, rank_tensors or {}, ctx)))
    return own


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


def _enforce_retention(directory: Path, newest: Path, ctx: ParallelContext, keep_last: int, keep_best: int) -> None:
    """Removes what ``--keep-last`` and ``--keep-best`` do not keep, once the newest has been read back and verified:
    the last checkpoint known to be good never goes.

    Raises:
        CheckpointError: the newest does not read back as it was written.
    """
    excess = from_first_rank(ctx, lambda: excess_checkpoints(directory, keep_last, keep_best, newest))
    if not excess:
        return
    problem = verify_checkpoint(newest, ctx)
    if problem is not None:
        if problem.damaged and ctx.is_first_rank:
            quarantine(newest)
        raise CheckpointError(
            f"--save {directory}: {newest.name} does not read back as written: {problem.text}; older ones are kept"
        )
    if ctx.is_first_rank:
        for path in excess:
            remove_checkpoint(path)


def load_checkpoint(
    path: str | Path,
    entries: Iterable[Entry],
    ctx: ParallelContext,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    verify: bool = True,
    allow_extra: tuple[str, ...] = (),
    cast: bool = False,
) -> dict[str, Any]:
    """Fills ``entries`` in place from the checkpoint ``path``, whatever layout wrote it. Collective.

    Args:
        path: one checkpoint, as :func:`megaforge.checkpoint.find.find_checkpoint` returns it.
        entries: the tensors to fill; each of their elements must be in the checkpoint exactly once.
        rank_tensors: this rank's own tensors to fill; they are left alone, with a warning on rank 0, when the
            checkpoint was written at another layout, where "the same rank" has no meaning, or has none (a converted
            one).
        verify: check every file's hash first; False when ``find_checkpoint`` has just done so.
        allow_extra: prefixes of keys in the checkpoint that may go unread (``("optimizer.",)``; ``("",)``: any).
        cast: convert element types that differ instead of refusing them.

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
    manifests: list[Manifest] = []
    together(ctx, lambda: manifests.append(read_manifest(path)))
    manifest = manifests[0]
    why = _why_ranks_differ(manifest, ctx)
    if rank_tensors and why and ctx.is_first_rank:
        logger.warning("%s %s: the ranks' own tensors (random states) start afresh", path, why)
    shards = build_shards_together(entries, None if why else rank_tensors, ctx)
    try:
        with _quiet():
            state_dict_loader.load(
                shards,
                storage_reader=CheckpointReader(path, manifest),
                planner=ShardLoadPlanner(allow_extra, cast),
                process_group=ctx.control,
                no_dist=ctx.control is None,
            )
    except CheckpointException as error:
        raise _translate(error, f"--load {path}") from error
    return manifest.meta


def _layouts(there: Mapping[str, int], here: Mapping[str, int]) -> str:
    """The axes whose size is another one, of the experts only where the others agree."""
    other = [name for name, size in here.items() if there.get(name, size) != size and name != "world"] or ["world"]
    named = [name for name in other if name not in ("etp", "edp")] or other
    before, now = (", ".join(f"{name} {sizes[name]}" for name in named) for sizes in (there, here))
    return f"was written at {before}, this run is {now}"


def _why_ranks_differ(manifest: Manifest, ctx: ParallelContext) -> str | None:
    """Why no rank here can take what a rank there kept for itself; None when it can."""
    here = layout_of(ctx)
    if here | dict(manifest.layout) != here:  # older checkpoints do not name the experts' axes
        return _layouts(manifest.layout, here)
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads by itself: that is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
