"""``--async-save``: the run waits while a checkpoint is copied in host memory, and goes on while it is written.

A rank copies only the pieces that it will write (of replicated ones, its share) into buffers that stay from save to
save. A thread then does what a save does in any case, with the copies in place of live memory: the files are the same
bytes. Its collectives have a group of their own, so that they never mix with those of the steps.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlan

from megaforge.checkpoint.after_publish import after_publish
from megaforge.checkpoint.checkpoint import Snapshot, save_snapshot
from megaforge.checkpoint.directory import KEEP_ALL, Retention
from megaforge.checkpoint.planner import deal_out
from megaforge.checkpoint.replica import Replica
from megaforge.checkpoint.shards import Shard
from megaforge.device import synchronize
from megaforge.errors import CheckpointError
from megaforge.monitor.events import EventLog
from megaforge.parallel.agree import exchange, together
from megaforge.parallel.context import ParallelContext, make_control_group

logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds of waiting for the save before that are worth a word


class _Piece(NamedTuple):
    """One piece of a tensor that this rank holds, as plans know it."""

    key: str
    offsets: torch.Size
    sizes: torch.Size
    dtype: torch.dtype


class BackgroundSave:
    """Saves of one run, one at a time. Every rank calls the same methods in the same order.

    Attributes:
        seconds_waited: how long :meth:`wait` has kept the run waiting, all in all.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        timeout_minutes: float | None = None,
        asked_by: str = "--async-save",
        events: EventLog | None = None,
    ) -> None:
        """Collective.

        Args:
            timeout_minutes: after which one of a save's collectives that does not end aborts.
            asked_by: the flag that messages name.
            events: are told what becomes of a checkpoint once it is published.
        """
        self._asked_by = asked_by
        self._ctx, self._events = ctx, events
        self._writers = ctx
        if ctx.control is not None:
            timeout = None if timeout_minutes is None else datetime.timedelta(minutes=timeout_minutes)
            self._writers = dataclasses.replace(ctx, control=make_control_group(timeout))
        self._held: list[_Piece] | None = None
        self._own: frozenset[tuple[str, torch.Size]] = frozenset()
        self._buffers: dict[tuple[str, torch.Size], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step = 0
        self._path: Path | None = None
        self._error: BaseException | None = None
        self.seconds_waited = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and not yet waited for."""
        return self._thread is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's part of it is not done."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        snapshot: Snapshot,
        directory: Path,
        *,
        goes_on_from: int | None = None,
        keep: Retention = KEEP_ALL,
        replica: Replica | None = None,
    ) -> None:
        """:meth:`begin` to write a checkpoint below ``directory``. Collective.

        Args:
            goes_on_from: as for :func:`megaforge.checkpoint.checkpoint.save_checkpoint`.
            keep: the older ones that stay once it is published.
            replica: where a copy goes.
        """

        def save(copied: Snapshot, ctx: ParallelContext) -> Path:
            path = self._path = save_snapshot(copied, directory, ctx, goes_on_from=goes_on_from)
            after_publish(path, ctx, keep, replica, self._events)
            return path

        self.begin(snapshot, save)

    def begin(self, snapshot: Snapshot, save: Callable[[Snapshot, ParallelContext], Path]) -> None:
        """Copies what this rank will write of ``snapshot`` and begins to ``save`` the copy; afterwards live memory may
        change. Collective.

        Args:
            save: what the thread does, given the copy and a context whose ``control`` is its own; returns the path.

        Raises:
            ValueError: the save before is not waited for.
            CheckpointError: on every rank, where ranks disagree or one has no memory for its copies.
        """
        if self._thread is not None:
            raise ValueError("one save at a time: wait for the one before")
        self._deal(snapshot.shards)
        shards = together(self._ctx, lambda: self._copy(snapshot.shards))
        head = dataclasses.replace(snapshot.head, meta=copy.deepcopy(snapshot.head.meta))
        self._path = self._error = None
        self._step = head.step
        work = partial(save, Snapshot(head, shards), self._writers)
        self._thread = threading.Thread(target=self._save, args=(work,), name="save")
        self._thread.start()

    def own_bytes(self, snapshot: Snapshot) -> int:
        """Bytes of the pieces of ``snapshot`` that this rank will write. Collective."""
        self._deal(snapshot.shards)
        return sum(
            view.nbytes
            for key, shard in snapshot.shards.items()
            for offsets, view in shard.pieces.items()
            if (key, offsets) in self._own
        )

    def wait(self) -> tuple[Path, int]:
        """The checkpoint that was started, once it is published, and its step. Collective.

        Raises:
            CheckpointError: on every rank, when any rank failed; earlier checkpoints are untouched.
        """
        if self._thread is None:
            raise ValueError("no save was started")
        began = time.monotonic()
        self._thread.join()
        waited = time.monotonic() - began
        self._thread = None
        self.seconds_waited += waited
        if waited > _PATIENCE and self._ctx.is_first_rank:
            logger.info(
                "%s: the run waited %.1f s for the checkpoint of step %d; saves that are further apart, or a faster "
                "disk, would not keep it waiting",
                self._asked_by,
                waited,
                self._step,
            )
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path, self._step

    def finish(self) -> None:
        """Waits for what is being written where the run ends by an exception, which is not to be hidden by another."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            logger.error("the checkpoint of step %d was not written either: %s", self._step, self._error)
        else:
            logger.warning("%s was still written", self._path)

    def _save(self, work: Callable[[], Path]) -> None:
        try:
            self._path = work()
        except BaseException as error:  # raised again where the run waits
            self._error = error

    def _deal(self, shards: dict[str, Shard]) -> None:
        """Decides which pieces this rank writes; anew only where some rank's pieces are others than last time."""
        held = [
            _Piece(key, offsets, view.shape, view.dtype)
            for key, shard in shards.items()
            for offsets, view in shard.pieces.items()
        ]
        if any(exchange(self._ctx, held != self._held)):
            self._held, self._own = None, frozenset()
            self._own = own_pieces(shards, self._ctx)
            self._held = held

    def _copy(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        copies: dict[str, Shard] = {}
        buffers: dict[tuple[str, torch.Size], torch.Tensor] = {}
        on_gpu = self._ctx.device.type == "cuda"
        for key, shard in shards.items():
            pieces = []
            for offsets, view in shard.pieces.items():
                if (key, offsets) not in self._own:
                    continue
                buffer = self._buffers.get((key, offsets))
                if buffer is None or (buffer.shape, buffer.dtype) != (view.shape, view.dtype):
                    buffer = _allocate(view, on_gpu, self._asked_by)
                buffers[key, offsets] = buffer.copy_(view, non_blocking=on_gpu)
                pieces.append((offsets, buffer))
            copies[key] = Shard(shard.shape, pieces)
        if on_gpu:
            synchronize(self._ctx.device)
        self._buffers = buffers
        return copies


def _allocate(view: torch.Tensor, pinned: bool, asked_by: str) -> torch.Tensor:
    try:
        return torch.empty(view.shape, dtype=view.dtype, device="cpu", pin_memory=pinned)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{asked_by}: no host memory for a copy of {view.nbytes:,} bytes; leave it out, or save from more ranks"
        ) from error


def own_pieces(shards: dict[str, Shard], ctx: ParallelContext) -> frozenset[tuple[str, torch.Size]]:
    """The pieces (key, offsets) of ``shards`` that a save lets this rank write: each piece of a tensor is written by
    one of its holders. Collective.

    Raises:
        CheckpointError: on every rank: the ranks' pieces do not make up the tensors.
    """
    plan = SavePlan([item for key, shard in shards.items() for item in shard.__create_write_items__(key, None)])
    gathered: list[SavePlan] = [plan]
    if ctx.control is not None and ctx.is_first_rank:
        gathered = [plan] * ctx.world.size
    if ctx.control is not None:
        dist.gather_object(plan, gathered if ctx.is_first_rank else None, dst=0, group=ctx.control)
    dealt: list[frozenset[tuple[str, torch.Size]] | str] = [""] * len(gathered)
    if ctx.is_first_rank:
        try:
            dealt = [_places(own) for own in deal_out(gathered)]
        except ValueError as error:
            dealt = [str(error)] * len(gathered)
    own = [dealt[0]]
    if ctx.control is not None:
        dist.scatter_object_list(own, dealt if ctx.is_first_rank else None, src=0, group=ctx.control)
    if isinstance(own[0], str):
        raise CheckpointError(own[0])
    return own[0]


def _places(plan: SavePlan) -> frozenset[tuple[str, torch.Size]]:
    return frozenset((item.index.fqn, torch.Size(item.index.offset or ())) for item in plan.items)
