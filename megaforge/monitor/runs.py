"""One run as its files tell it: how far it is, whether it goes on, and its numbers as columns."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from megaforge.monitor.events import EVENTS_FILE, process_birth, wrong_fields
from megaforge.monitor.jsonl_tail import AT_ONCE, JsonlTail

METRICS_FILE = "metrics.jsonl"  # where a run's metrics are looked for that does not say where it writes them
SILENT_SECONDS = 180.0  # without an event of a run on another machine, which tells one a minute
_PACE = 50  # steps whose median time is the run's pace
_MOST_EVENTS = 10_000
_NOT_YET = frozenset(("start", "load", "rejected", "mended", "layout"))  # told while the iteration stands at 0


class Status(StrEnum):
    """What has become of a run."""

    WAITING = "waiting"  # not started
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"  # it was asked to; it can go on
    FAILED = "failed"  # it said why
    LOST = "lost"  # its process has gone without a word
    SILENT = "silent"  # it is on another machine, which has told nothing for a while


class Columns:
    """Records of one kind as columns of float64 of one length; NaN stands where a record lacks a number."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, name: str) -> array[float]:
        """The column ``name``. ``numpy.frombuffer`` shows it without a copy; while such a view lives, the column cannot
        grow."""
        return self._columns[name]

    def add(self, record: Mapping[str, Any]) -> None:
        """Another row: what is a number in ``record``."""
        for name, value in record.items():
            if type(value) in (int, float):
                column = self._columns.get(name)
                if column is None:
                    column = self._columns[name] = array("d", [math.nan]) * self._rows
                column.append(_as_float(value))
        self._rows += 1
        for column in self._columns.values():
            if len(column) < self._rows:
                column.append(math.nan)

    def last(self) -> dict[str, float]:
        """The numbers of the last row."""
        if not self._rows:
            return {}
        return {name: column[-1] for name, column in self._columns.items() if not math.isnan(column[-1])}


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any size
        return math.inf if value > 0 else -math.inf


class Run:
    """A run in a directory of ``--save``, as far as its ``events.jsonl`` and its metrics file say.

    All of it comes from the files: a reader that is started again knows the same.

    Attributes:
        name: its path below the folder of runs.
        directory: where its events are.
        metrics_path: the metrics file that its newest start names, or ``metrics.jsonl`` beside the events.
        events: in their order, without ``progress``; the newest 10,000.
        new_events: those that the last :meth:`poll` brought, ``progress`` too.
        marks: (time, iteration) of each event that says how far the run is, over all attempts.
        start: the newest ``start`` event; empty before there is one.
        steps, evaluations: the records of the metrics file's newest run.
        version: rises when rows went: the file was cut or written anew, or another run began in it.
        behind: files hold more than the last :meth:`poll` took.
    """

    def __init__(self, name: str, directory: Path, now: Callable[[], float] = time.time) -> None:
        self.name, self.directory, self._now = name, directory, now
        self._event_tail = JsonlTail(directory / EVENTS_FILE)
        self._metrics_tail = JsonlTail(directory / METRICS_FILE)
        self.behind, self.version, self._known_status = False, 0, Status.WAITING
        self._clear_events()
        self._clear_metrics()

    def _clear_events(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.new_events: list[dict[str, Any]] = []
        self.marks: list[tuple[float, int]] = []
        self.start: dict[str, Any] = {}
        self._end: dict[str, Any] | None = None
        self._problem = ""
        self.last_event_time: float | None = None

    def _clear_metrics(self) -> None:
        self.steps, self.evaluations = Columns(), Columns()
        self.version += 1

    @property
    def metrics_path(self) -> Path:
        return self._metrics_tail.path

    @property
    def unreadable(self) -> int:
        """Lines of its files that are not what they should be, and were passed over."""
        return self._event_tail.unreadable + self._metrics_tail.unreadable

    @property
    def taken(self) -> int:
        """Bytes that the last :meth:`poll` read."""
        return self._event_tail.taken + self._metrics_tail.taken

    def poll(self, limit: int = AT_ONCE) -> bool:
        """Reads what is new, about ``limit`` bytes of each file at most; whether anything changed."""
        events = self._event_tail.read(limit)
        changed = bool(events) or self._event_tail.again
        if self._event_tail.again:
            self._clear_events()
        self.new_events = [event for event in events if self._take_event(event)]
        records = self._metrics_tail.read(limit)
        if self._metrics_tail.again:
            self._clear_metrics()
        for record in records:
            self._take_record(record)
        self.behind = self._event_tail.behind or self._metrics_tail.behind
        status = self.status
        changed |= bool(records) or self._metrics_tail.again or status is not self._known_status
        self._known_status = status
        return changed

    def _take_event(self, event: dict[str, Any]) -> bool:
        if wrong_fields(event):
            self._event_tail.unreadable += 1
            return False
        kind, self.last_event_time = event["kind"], float(event["time"])
        if kind == "start":
            self.start, self._end, self._problem = event, None, ""
            self._follow_metrics(event.get("metrics_file"))
        else:
            if kind == "end":
                self._end = event
            elif kind == "load" and event.get("error"):
                self._problem = str(event["error"])
            if kind not in _NOT_YET:
                self.marks.append((self.last_event_time, event["iteration"]))
        if kind != "progress":
            self.events.append(event)
            del self.events[:-_MOST_EVENTS]
        return True

    def _follow_metrics(self, path: Any) -> None:
        if isinstance(path, str) and Path(path) != self.metrics_path:
            self._metrics_tail = JsonlTail(path)
            self._clear_metrics()

    def _take_record(self, record: dict[str, Any]) -> None:
        kind, iteration = record.get("kind"), record.get("iteration")
        columns = {"step": self.steps, "evaluation": self.evaluations}.get(str(kind))
        if type(iteration) is not int or (columns is None and kind != "test"):
            self._metrics_tail.unreadable += 1
            return
        if columns is None:
            return
        if len(columns) and iteration < columns["iteration"][-1] + (kind == "step"):
            self._clear_metrics()  # another run's rows follow those of an earlier one
            columns = self.steps if kind == "step" else self.evaluations
        columns.add(record)

    @property
    def status(self) -> Status:
        """What has become of it, as far as this machine can see."""
        if not self.start:
            return Status.WAITING
        if self._end is not None:
            if self._end.get("error"):
                return Status.FAILED
            return Status.COMPLETED if self._end.get("complete") is True else Status.STOPPED
        if process_is_there(self.start):
            return Status.RUNNING
        if process_is_there(self.start) is False:
            return Status.FAILED if self._problem else Status.LOST
        recent = self.last_event_time is not None and self._now() - self.last_event_time < SILENT_SECONDS
        return Status.RUNNING if recent else Status.SILENT

    @property
    def reason(self) -> str:
        """Why it ended, as far as it said so."""
        return str(self._end.get("reason", "")) if self._end is not None else self._problem

    @property
    def iteration(self) -> int:
        """Steps done."""
        told = self.marks[-1][1] if self.marks else 0
        if not len(self.steps):
            return told
        last = self.steps["iteration"][-1]
        return max(told, int(last)) if math.isfinite(last) else told

    @property
    def train_iters(self) -> int | None:
        """Steps that it is to make."""
        value = self.start.get("train_iters")
        return value if type(value) is int and value > 0 else None

    @property
    def share(self) -> float | None:
        """How far it is, from 0 to 1; None where it has not said how far it is to go."""
        if self.status is Status.COMPLETED:
            return 1.0  # early stopping ends a run for good before its last step
        if self.train_iters is None:
            return None
        return min(1.0, self.iteration / self.train_iters)

    @property
    def seconds_per_step(self) -> float | None:
        """The median of its last 50 steps; by its events where it writes no metrics."""
        if "step_seconds" in set(self.steps):
            seconds = [value for value in self.steps["step_seconds"][-_PACE:] if math.isfinite(value)]
            if seconds:
                return statistics.median(seconds)
        recent = [mark for mark in self.marks[-_PACE:] if mark[0] >= float(self.start.get("time", math.inf))]
        if len(recent) > 1 and recent[-1][1] > recent[0][1] and recent[-1][0] > recent[0][0]:
            return (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
        return None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of its own work that are left at its pace; None: not known."""
        if self.status is Status.COMPLETED:
            return 0.0
        pace = self.seconds_per_step
        if pace is None or self.train_iters is None:
            return None
        return max(0, self.train_iters - self.iteration) * pace

    def summary(self) -> dict[str, Any]:
        """All of this as JSON, with the newest step's and evaluation's numbers."""
        return {
            "name": self.name,
            "run": self.start.get("run"),
            "status": str(self.status),
            "reason": self.reason,
            "iteration": self.iteration,
            "train_iters": self.train_iters,
            "share": self.share,
            "seconds_per_step": self.seconds_per_step,
            "eta_seconds": self.eta_seconds,
            "last_event_time": self.last_event_time,
            "layout": self.start.get("layout"),
            "version": self.version,
            "unreadable": self.unreadable,
            "step": _finite(self.steps.last()),
            "evaluation": _finite(self.evaluations.last()),
        }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def process_is_there(start: Mapping[str, Any]) -> bool | None:
    """Whether the process that told ``start`` (with ``host``, ``pid``, ``born``) still is; None: it is on another
    machine, or did not say enough."""
    pid, born = start.get("pid"), start.get("born")
    if start.get("host") != socket.gethostname() or type(pid) is not int or type(born) not in (int, float):
        return None
    if pid == os.getpid():
        return True
    return process_birth(pid) == born
