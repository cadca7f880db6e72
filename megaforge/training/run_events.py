"""What every run tells of itself in ``events.jsonl`` (:mod:`megaforge.monitor.events`)."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.checkpoint.checkpoint import layout_of
from megaforge.checkpoint.manifest import sums_digest
from megaforge.config.launcher import discover_launch, print_rank_0
from megaforge.errors import UserError
from megaforge.monitor.accounting import Accounting
from megaforge.monitor.events import EVENTS_FILE, EventLog, process_birth, read_events, uptime
from megaforge.monitor.provenance import code_version
from megaforge.parallel.agree import exchange, together
from megaforge.training.auditing import open_trail
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

PROGRESS_SECONDS = 60.0  # between events that tell only how far the run is: what a killed run leaves unaccounted


def open_events(trainer: Trainer) -> EventLog:
    """The event log of ``trainer``: below ``--save`` on the first rank, elsewhere one that writes nothing; tells the
    start. Collective.

    Raises:
        UserError: on every rank: it cannot be written.
    """
    directory = trainer.config.checkpoint.save
    if directory is None:
        return EventLog()
    hosts = Counter(exchange(trainer.ctx, socket.gethostname()))

    def opened() -> EventLog:
        if not trainer.ctx.is_first_rank:
            return EventLog()
        log = EventLog(Path(directory) / EVENTS_FILE, lambda: trainer.iteration)
        trainer.audit = open_trail(trainer, Path(directory))
        if trainer.audit is not None:
            log.listeners.append(trainer.audit.heard)
        log.tell("start", **_start(trainer), hosts=dict(hosts))
        return log

    return together(trainer.ctx, opened)


def _start(trainer: Trainer) -> dict[str, Any]:
    launch, metrics = discover_launch(), trainer.config.logging.metrics_file
    restarts = {
        name: int(value)
        for name, variable in (("torchrun_restarts", "TORCHELASTIC_RESTART_COUNT"), ("requeues", "SLURM_RESTART_COUNT"))
        if (value := os.environ.get(variable, "")).isdigit()
    }
    return {
        "run": trainer.config.name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": process_birth("self"),
        "launcher": launch.launcher,
        "layout": layout_of(trainer.ctx, len(trainer.model.chunks)),
        "train_iters": trainer.config.training.train_iters,
        "metrics_file": None if metrics is None else os.path.abspath(metrics),
        **code_version(),
        **restarts,
    }


def of_checkpoint(trainer: Trainer, path: Path | None) -> dict[str, Any]:
    """What events tell of the checkpoint ``path``: its name, and a digest of all that is in it."""
    if trainer.events.path is None:
        return {}
    if path is None:
        return {"path": None}
    try:
        return {"path": path.name, "sums": sums_digest(path)}
    except OSError:  # which loading or the next look at it reports
        return {"path": path.name, "sums": None}


class RunEvents(Callback):
    """Tells when training begins and ends, how far it is once a minute, and what the time went into."""

    place = Place.BEFORE

    def __init__(self, interval: int) -> None:
        """``interval``: steps between those that report the goodput."""
        self._interval, self._told = interval, time.monotonic()
        self._accounting = Accounting()

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.events.path is None:
            return
        trainer.events.tell("train")
        try:
            self._accounting = Accounting(read_events(trainer.events.path).events)
        except UserError as error:
            print_rank_0(f"{error}; the goodput is of what comes now")
        trainer.events.listeners.append(self._accounting.add)
        self._told = time.monotonic()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if trainer.events.path is None:
            return
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            trainer.events.tell("progress")
            self._told = time.monotonic()
        if metrics.iteration % self._interval == 0:
            metrics.extra["goodput"] = round(self._accounting.goodput(uptime(), metrics.iteration).share, 4)

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.events.path is None:
            return
        error = sys.exc_info()[1]
        reason = trainer.stop_reason or ("--train-iters is reached" if trainer.finished else "an error")
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
        failed = {} if error is None else {"error": reason}
        trainer.events.tell("end", reason=reason, complete=error is None and trainer.complete, **failed)
        found = self._accounting.goodput()
        spent = {name: round(seconds, 3) for name, seconds in found.spent.items()}
        trainer.events.tell("goodput", share=round(found.share, 4), spent=spent, attempts=found.attempts)
        for line in found.lines():
            print_rank_0(line)
