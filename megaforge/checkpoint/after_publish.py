"""What follows once a checkpoint is published, by the run or by its background thread."""

from __future__ import annotations

from pathlib import Path

from megaforge.checkpoint.checkpoint import enforce_retention
from megaforge.checkpoint.directory import Retention
from megaforge.checkpoint.replica import Replica, copy_and_retain
from megaforge.monitor.events import EventLog
from megaforge.parallel.context import ParallelContext


def after_publish(
    path: Path, ctx: ParallelContext, keep: Retention, replica: Replica | None, events: EventLog | None = None
) -> None:
    """Lets those beside ``path`` go that ``keep`` does not name, copies ``path`` to ``replica``, and tells ``events``.
    Collective.

    Raises:
        CheckpointError: the new one does not read back as written; the older ones stay.
    """
    events = events or EventLog()
    removed = enforce_retention(path, ctx, keep) if keep.last else []
    if removed:
        events.tell("retain", removed=[old.name for old in removed])
    if replica is not None:
        problem = copy_and_retain(replica, path, removed, ctx)
        events.tell("replica", path=path.name, problem=problem)
