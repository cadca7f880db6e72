"""What every run tells of itself in ``events.jsonl`` (:mod:`megaforge.monitor.events`)."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megaforge
from megaforge.checkpoint.checkpoint import layout_of
from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch
from megaforge.monitor.events import EVENTS_FILE, EventLog
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import EvaluationMetrics
    from megaforge.training.trainer import Trainer


def open_events(trainer: Trainer) -> EventLog:
    """The event log of ``trainer``: below ``--save`` on the first rank, elsewhere one that writes nothing; tells the
    start.

    Raises:
        UserError: it cannot be written.
    """
    config, ctx = trainer.config, trainer.ctx
    if config.checkpoint.save is None or not ctx.is_first_rank:
        return EventLog()
    log = EventLog(Path(config.checkpoint.save) / EVENTS_FILE, lambda: trainer.iteration)
    log.tell("start", **_start(config, ctx, len(trainer.model.chunks)))
    return log


def _start(config: Config, ctx: ParallelContext, chunks: int) -> dict[str, Any]:
    launch = discover_launch()
    restarts = {
        name: int(value)
        for name, variable in (("torchrun_restarts", "TORCHELASTIC_RESTART_COUNT"), ("requeues", "SLURM_RESTART_COUNT"))
        if (value := os.environ.get(variable, "")).isdigit()
    }
    return {
        "run": config.name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launcher": launch.launcher,
        "layout": layout_of(ctx, chunks),
        "version": megaforge.__version__,
        "train_iters": config.training.train_iters,
        **restarts,
    }


class RunEvents(Callback):
    """Tells when training begins and ends, and of each checkpoint, evaluation and test."""

    place = Place.AFTER

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer) -> None:
        trainer.events.tell("train")

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        trainer.events.tell("evaluate", **metrics.values())

    def on_test(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        trainer.events.tell("test", **metrics.values())

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        trainer.events.tell("save", path=path.name, step=trainer.saved_iteration)

    def on_train_end(self, trainer: Trainer) -> None:
        error = sys.exc_info()[1]
        reason = trainer.stop_reason or ("--train-iters is reached" if trainer.finished else "an error")
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
        trainer.events.tell("end", reason=reason, complete=error is None and trainer.complete)
