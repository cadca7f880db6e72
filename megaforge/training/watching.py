"""Tells the watchdog what the run does (:mod:`megaforge.resilience.watchdog`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.monitor.events import EVENTS_FILE, EventLog
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.last_words import LastWords, write_recorder
from megaforge.resilience.watchdog import Watchdog
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Watching(Callback):
    """Tells a watchdog, where there is one, of each part of a step and of what lies between steps."""

    place = Place.AFTER

    def __init__(self, watchdog: Watchdog | None) -> None:
        self.watchdog = watchdog

    def tell(self, phase: str) -> None:
        """The run does ``phase`` from now on."""
        if self.watchdog is not None:
            self.watchdog.tell(phase)

    def on_train_start(self, trainer: Trainer) -> None:
        trainer.tell_phase = self.tell
        if self.watchdog is not None:
            self.watchdog.on_hang = partial(_tell_hang, trainer)
        self.tell(f"batch of step {trainer.iteration + 1}")

    def on_step_start(self, trainer: Trainer) -> None:
        self.tell(f"step {trainer.iteration + 1}: forward and backward")

    def on_gradients(self, trainer: Trainer) -> None:
        self.tell(f"step {trainer.iteration + 1}: update")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.tell(f"batch of step {trainer.iteration + 1}")

    def on_train_end(self, trainer: Trainer) -> None:
        self.tell("end")


def _tell_hang(trainer: Trainer, words: dict[int, LastWords], meant: list[str]) -> None:
    """The event, by the first rank that still speaks, which need not be the one that has the log."""
    events, save = trainer.events, trainer.config.checkpoint.save
    if events.path is None and save is not None:
        events = EventLog(Path(save) / EVENTS_FILE, lambda: trainer.iteration)
    events.tell("hang", meaning=meant, ranks={str(rank): one.line() for rank, one in sorted(words.items())})


def _own_store() -> Store:
    """The store at which the ranks met, by a connection of its own: a wait on another does not hold it up."""
    return PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]


@contextmanager
def watched(config: Config, ctx: ParallelContext) -> Iterator[Watching]:
    """Within, a run that hangs for ``--hang-timeout-minutes`` ends by itself. Collective.

    What ends the block with an error other than a :class:`UserError`, such as a collective whose time is over, leaves
    torch's flight recorder below ``--save``.
    """
    size, flags = ctx.world.size, config.resilience
    seconds = flags.hang_seconds(config.parallel.distributed_timeout_minutes, size)
    folder = None if config.checkpoint.save is None else Path(config.checkpoint.save) / "hang"
    watchdog = None
    if seconds:
        store = _own_store() if size > 1 else None
        watchdog = Watchdog(ctx, seconds, store, folder)
    try:
        yield Watching(watchdog)
    except Exception as error:
        if not isinstance(error, UserError) and folder is not None and dist.is_initialized():
            try:
                _ = write_recorder(folder, ctx.world.rank)
            except OSError as failure:
                print(f"{folder}: torch's flight recorder cannot be written ({failure.strerror})", file=sys.stderr)
        raise
    finally:
        if watchdog is not None:
            watchdog.close()
