"""Watches runs by their files and raises what they cannot say of themselves, as ``tools/watch_runs.py`` does."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaforge.config.alert_config import AlertConfig
from megaforge.errors import UserError
from megaforge.monitor.alert_channels import EventChannel
from megaforge.monitor.alert_kinds import AlertKind
from megaforge.monitor.alerts import EVENT, AlertBook, Channel, Finding
from megaforge.monitor.disks import disk_share
from megaforge.monitor.events import EventLog, read_events
from megaforge.monitor.runs import Run, Status
from megaforge.monitor.runs_folder import Runs
from megaforge.monitor.watch_rules import FileRule
from megaforge.registry import ALERTS

ALERTS_FILE = "alerts.jsonl"  # beside a run's events, in their form: what watchers found
FOLDER, FOLDER_FILE = "(runs folder)", "runs_alerts.jsonl"  # whose disk is told of once, not by each run
_ENDED = (Status.COMPLETED, Status.STOPPED)


def _book(
    log: EventLog, name: str, flags: AlertConfig, kinds: dict[str, AlertKind], channels: Sequence[Channel]
) -> AlertBook:
    """That of ``name``, which goes on from what ``log`` holds.

    Raises:
        UserError: it holds something else.
    """
    book = AlertBook(
        [*channels, EventChannel(log)],
        name,
        socket.gethostname(),
        repeat=60 * flags.alert_repeat_minutes,
        severities=lambda alert: kinds[alert].severity,
    )
    if log.path is not None and log.path.exists():
        book.restore(event for event in read_events(log.path).events if event.get("alert") in kinds)
    return book


class WatchedRun:
    """One run under watch: its alerts, as it told them itself and as its files show them.

    Attributes:
        book: how each stands.
    """

    def __init__(
        self,
        run: Run,
        flags: AlertConfig,
        kinds: dict[str, AlertKind],
        channels: Sequence[Channel],
        heartbeat_minutes: float,
    ) -> None:
        """``channels``: who is told, besides ``alerts.jsonl`` in the run's directory.

        Raises:
            UserError: that file holds something else.
        """
        self.run, self._kinds = run, kinds
        self._log = EventLog(run.directory / ALERTS_FILE, lambda: run.iteration)
        self.book = _book(self._log, run.name, flags, kinds, channels)
        found = {name: kind.of_files(heartbeat_minutes) for name, kind in kinds.items()}
        self._rules: dict[str, FileRule] = {name: rule for name, rule in found.items() if rule is not None}
        self._heard = run.new_events
        self._own = dict(self._told(run.events))  # of what was over before nobody is told
        for name, finding in self._own.items():
            self.book.enter(name, finding)

    def _told(self, events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Finding]]:
        """What the run itself said of alerts that no rule here looks for."""
        for event in events:
            name = event.get("alert")
            if event["kind"] == EVENT and name in self._kinds and name not in self._rules:
                yield str(name), Finding(event.get("state") == "firing", str(event.get("text", "")))

    def hear(self) -> None:
        """Takes in the events that the last poll of the run brought."""
        if self.run.new_events is self._heard:
            return
        self._heard = self.run.new_events
        for name, finding in self._told(self._heard):
            self._own[name] = finding
            self.book.enter(name, finding)

    def look(self) -> None:
        """Raises and resolves what its files say now."""
        for name, rule in self._rules.items():
            if (found := rule.look(self.run)) is not None:
                self.book.enter(name, found)
        for name, found in self._own.items():
            if self.run.status in _ENDED:
                self.book.enter(name, Finding(False, "the run has ended"))
            elif self.run.status is Status.RUNNING:
                self.book.enter(name, found)

    def leave(self, why: str, *, gone: bool) -> None:
        """It is not watched any more; ``gone``: nothing can be written beside it."""
        if gone:
            self._log.path = None
        for name in self.book.firing:
            self.book.enter(name, Finding(False, why))
        self.book.close(0.0)


class Watcher:
    """Watches all runs below a folder.

    Attributes:
        passed_over: runs of which nothing is raised, as they told nothing for longer than ``since_hours``.
        problems: of runs that cannot be watched, by their names.
    """

    def __init__(
        self,
        directory: Path,
        flags: AlertConfig,
        channels: Sequence[Channel],
        *,
        heartbeat_minutes: float,
        since_hours: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._flags, self._channels, self._now = flags, list(channels), now
        self._heartbeat, self._since = heartbeat_minutes, 3600 * since_hours
        self._directory, self._runs = directory, Runs(directory, now=now)
        names = [name for name in ALERTS.names() if name not in flags.alerts_off]
        self._kinds: dict[str, AlertKind] = {name: ALERTS.get(name) for name in names}
        self._watched: dict[str, WatchedRun] = {}
        self._folder = _book(EventLog(directory / FOLDER_FILE), FOLDER, flags, self._kinds, channels)
        self.passed_over: list[str] = []
        self.problems: dict[str, str] = {}

    @property
    def firing(self) -> dict[str, dict[str, str]]:
        """What is wrong now: the text of each alert by its name, by the run."""
        found = {name: watched.book.firing for name, watched in self._watched.items()} | {FOLDER: self._folder.firing}
        return {name: alerts for name, alerts in found.items() if alerts}

    @property
    def watched(self) -> int:
        """Runs under watch."""
        return len(self._watched)

    def look(self) -> None:
        """Reads what is new in all runs, and tells what changed."""
        behind = True
        while behind:
            changes = self._runs.poll()
            behind = changes.behind
            for name in changes.removed:
                if (watched := self._watched.pop(name, None)) is not None:
                    watched.leave("its folder was deleted", gone=True)
            for watched in self._watched.values():
                watched.hear()
            self._begin()
        for name, watched in list(self._watched.items()):
            if self._is_old(watched.run):
                del self._watched[name]
                watched.leave("it is not watched any more: nothing was heard of it for too long", gone=False)
            else:
                watched.look()
        self.passed_over = sorted(self._runs.runs.keys() - self._watched.keys() - self.problems.keys())
        self._look_at_folder()

    def _begin(self) -> None:
        for name, run in self._runs.runs.items():
            if run.behind or name in self._watched or name in self.problems or self._is_old(run):
                continue
            try:
                watched = WatchedRun(run, self._flags, self._kinds, self._channels, self._heartbeat)
            except UserError as error:
                self.problems[name] = str(error)
                continue
            self._watched[name] = watched

    def _is_old(self, run: Run) -> bool:
        told = run.last_event_time
        return told is not None and self._now() - told > self._since and run.status is not Status.RUNNING

    def _look_at_folder(self) -> None:
        if "disk" in self._kinds:
            share, limit = disk_share([self._directory]), self._flags.alert_disk_share
            text = f"the disk of {self._directory} is {share:.1%} full (limit {limit:.0%})"
            self._folder.enter("disk", Finding(share > limit, text, round(share, 4), limit))

    def close(self) -> None:
        """Ends; what was told has ten seconds to arrive."""
        for watched in self._watched.values():
            watched.book.close(0.0)
        self._folder.close()
