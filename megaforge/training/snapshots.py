"""``--snapshot-interval``: the run's state in memory every few steps, beside checkpoints on a disk.

As with ``--async-save`` the run waits only while each rank copies its share; a thread makes a snapshot of the copies
(:mod:`megaforge.resilience.snapshots`). One that cannot be made is a warning: the run has its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megaforge.checkpoint.background import BackgroundSave
from megaforge.checkpoint.checkpoint import Snapshot
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.durable import replacing
from megaforge.errors import CheckpointError
from megaforge.json_text import parse_json
from megaforge.parallel.agree import exchange, from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.nodes import find_nodes
from megaforge.resilience.snapshots import SnapshotStore, own_folder
from megaforge.training.callbacks import Callback, Place
from megaforge.training.checkpointing import run_snapshot

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
RUN_FILE = "snapshots.json"  # below --save: which snapshots are of this run


def snapshot_store(config: Config, ctx: ParallelContext) -> SnapshotStore | None:
    """Where the snapshots of the run of ``config`` are; None where it makes none. Collective.

    A run that makes none leaves those of its past behind it: they are not taken up again later.

    Raises:
        UserError: on every rank: they cannot be there.
    """
    flags, save = config.resilience, config.checkpoint.save
    if save is None:
        return None
    file = Path(save) / RUN_FILE
    if flags.snapshot_interval is None:
        from_first_rank(ctx, lambda: file.unlink(missing_ok=True))
        return None
    run = from_first_rank(ctx, lambda: _run_name(file))
    nodes = find_nodes(ctx, flags.snapshot_ranks_per_node)
    if flags.snapshot_peers and len(nodes.members) == 1:
        print_rank_0("--snapshot-peers: all ranks are on one machine, so that no other keeps a copy")
    folder = snapshot_folder(flags.snapshot_dir, save)
    if flags.snapshot_dir is None:
        together(ctx, lambda: own_folder(folder.parent))
    if flags.snapshot_ranks_per_node is not None:
        folder /= f"node_{nodes.own}"
    return SnapshotStore(ctx, folder, nodes, run, peers=flags.snapshot_peers)


def snapshot_folder(directory: str | None, save: str) -> Path:
    """A folder of the run that saves to ``save``, in ``directory`` or the machine's shared memory."""
    whole = os.path.realpath(save)
    name = f"{Path(whole).name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"
    return (SHARED_MEMORY / f"megaforge-{os.getuid()}" if directory is None else Path(directory)) / name


def _run_name(file: Path) -> str:
    """The run's name for itself; a new one where ``file`` has none."""
    if file.exists():
        try:
            return str(parse_json(file.read_bytes())["run"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: snapshots of this run's past are not taken up", file)
    run = secrets.token_hex(8)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"run": run}), encoding="ascii")
    return run


class Snapshots(Callback):
    """Takes a snapshot after every ``interval`` steps, unless the one before is still being written; none after a step
    that is saved. They go when the run's end is saved."""

    place = Place.SAVE

    def __init__(self, interval: int, store: SnapshotStore, background: BackgroundSave) -> None:
        self.interval, self.store, self._background = interval, store, background
        self._begun, self._failed = 0, False

    @classmethod
    def of(cls, trainer: Trainer, store: SnapshotStore, loaded: Path | None) -> Snapshots:
        """Of a trainer whose state was ``loaded`` from there: what else is in memory is of the past. Collective."""
        config = trainer.config
        store.clear(keep=loaded if loaded is not None and loaded.parent == store.folder else None)
        background = BackgroundSave(trainer.ctx, config.parallel.distributed_timeout_minutes, "--snapshot-interval")
        assert config.resilience.snapshot_interval is not None
        return cls(config.resilience.snapshot_interval, store, background)

    def on_train_start(self, trainer: Trainer) -> None:
        if not trainer.finished:
            self.store.check_room(self._background.own_bytes(run_snapshot(trainer)))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.finished:
            self._settle(trainer)
            return
        if trainer.iteration % self.interval or trainer.saved_iteration == trainer.iteration:
            return
        if any(exchange(trainer.ctx, self._background.writing)):
            self._tell(trainer, trainer.iteration, "the one before is still being written")
            return
        self._settle(trainer)
        began, self._begun = time.perf_counter(), trainer.iteration
        trainer.optimizer.wait_for_parameters()

        def write(copied: Snapshot, ctx: ParallelContext) -> Path:
            stall = time.perf_counter() - began
            path = self.store.write(copied, ctx)
            seconds = time.perf_counter() - began
            trainer.events.tell("snapshot", step=copied.head.step, stall=round(stall, 4), seconds=round(seconds, 4))
            return path

        try:
            self._background.begin(run_snapshot(trainer), write)
        except CheckpointError as error:
            self._tell(trainer, trainer.iteration, str(error))

    def on_rollback(self, trainer: Trainer) -> None:
        """What is in memory may be of the steps that were undone."""
        self._settle(trainer)
        self.store.clear()

    def _settle(self, trainer: Trainer) -> None:
        """Waits for the snapshot that was begun, if there is one; tells of one that could not be made."""
        if not self._background.in_flight:
            return
        try:
            self._background.wait()
            self._failed = False
        except CheckpointError as error:
            self._tell(trainer, self._begun, str(error))

    def _tell(self, trainer: Trainer, step: int, problem: str) -> None:
        """A snapshot that is not made: a warning where the one before was."""
        trainer.events.tell("snapshot", step=step, left_out=problem)
        if not self._failed and trainer.ctx.is_first_rank:
            logger.warning("--snapshot-interval %d: a snapshot is left out: %s", self.interval, problem)
        self._failed = True

    def on_train_end(self, trainer: Trainer) -> None:
        """What ends by an exception is gone on with from what is there."""
        self._background.finish()
        if trainer.finished and trainer.saved_iteration == trainer.iteration:
            self.store.remove()
