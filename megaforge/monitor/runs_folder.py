"""All runs below a folder, and how far they are together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.monitor.events import EVENTS_FILE, wrong_fields
from megaforge.monitor.jsonl_tail import AT_ONCE, JsonlTail
from megaforge.monitor.runs import Run, Status, process_is_there

FLEET_FILE = "fleet.jsonl"  # what a fleet's supervisor tells, in the form of events.jsonl
DEPTH = 3  # directories below the folder in which runs are looked for
_RESCAN_SECONDS = 2.0
_BUDGET = 32 << 20  # bytes that one poll reads: a folder of large files is read in several
_FAILED = (Status.FAILED, Status.LOST, Status.SILENT)


class Overall(NamedTuple):
    """How far several runs are together.

    Attributes:
        models: how many there are, waiting ones too.
        completed, running: how many of them are.
        stopped: how many ended when they were asked to, before they were complete; they can go on.
        failed: how many ended by an error, or went without a word.
        share: of all their steps' work, each run counting the same, from 0 to 1.
        eta_seconds: until the last of those that run or wait is complete; None: not known yet.
    """

    models: int
    completed: int
    running: int
    stopped: int
    failed: int
    share: float
    eta_seconds: float | None

    def line(self) -> str:
        """For people: ``Training 2 models in parallel: Overall 65.3%``."""
        what = f"Training {self.running} models in parallel" if self.running > 1 else "Training 1 model"
        if not self.running:
            what = f"{self.completed} of {self.models} models complete"
        return f"{what}: Overall {self.share:.1%}"


class Changed(NamedTuple):
    """Names of what a poll found new, different, or gone; ``behind``: it did not get to the end of all files."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    behind: bool


class Fleet:
    """A folder whose supervisor told ``fleet.jsonl``.

    Attributes:
        name: its path below the folder of runs.
        events: what the supervisor told, in order.
        start: its newest ``fleet_start`` event; empty before there is one.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self._tail = JsonlTail(directory / FLEET_FILE)
        self.events: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}
        self.unreadable = 0
        self._known = False

    def poll(self) -> bool:
        """Reads what is new; whether anything changed."""
        events = self._tail.read()
        if self._tail.again:
            self.events, self.start = [], {}
        for event in events:
            if wrong_fields(event):
                self.unreadable += 1
                continue
            self.events.append(event)
            if event["kind"] == "fleet_start":
                self.start = event
        running = self.running
        changed = bool(events) or self._tail.again or running is not self._known
        self._known = running
        return changed

    @property
    def models(self) -> dict[str, int | None]:
        """Steps of each model by its name, as the fleet's start told them."""
        steps = {str(one.get("name")): one.get("train_iters") for one in self._listed()}
        return {name: value if type(value) is int and value > 0 else None for name, value in steps.items()}

    def _listed(self) -> list[dict[str, Any]]:
        listed = self.start.get("models")
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    def runs(self) -> list[str]:
        """The names of its models' runs below the folder of runs."""
        listed = {str(one.get("name")): one.get("directory") for one in self._listed()}
        places = [place if isinstance(place, str) else name for name, place in listed.items()]
        return [os.path.normpath(os.path.join(self.name, place)) for place in places]

    @property
    def running(self) -> bool:
        """Whether its supervisor is there, as far as this machine can see."""
        return bool(self.start) and self.events[-1]["kind"] != "fleet_end" and bool(process_is_there(self.start))


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


class Runs:
    """The runs below a folder. All that it knows comes from their files: started again, it knows the same.

    Attributes:
        runs: by their paths below the folder; ``.`` is a run in the folder itself.
        fleets: likewise.
        sequence: rises with every poll that found a change.
    """

    def __init__(
        self, directory: str | os.PathLike[str], depth: int = DEPTH, now: Callable[[], float] = time.time
    ) -> None:
        self.directory, self._depth, self._now = Path(directory), depth, now
        self.runs: dict[str, Run] = {}
        self.fleets: dict[str, Fleet] = {}
        self.sequence = 0
        self._scanned: float | None = None
        self._next = 0  # which run the next poll begins with

    def poll(self) -> Changed:
        """Looks for runs that came or went (every two seconds), and reads what is new in each."""
        added, removed = list[str](), list[str]()
        if self._scanned is None or time.monotonic() - self._scanned >= _RESCAN_SECONDS:
            added, removed = self._scan()
            self._scanned = time.monotonic()
        changed, behind = self._read()
        changed += [name for name, fleet in self.fleets.items() if fleet.poll()]
        if added or removed or changed:
            self.sequence += 1
        return Changed(added, changed, removed, behind)

    def _scan(self) -> tuple[list[str], list[str]]:
        found = dict(_directories(self.directory, self._depth))
        runs = {name for name, path in found.items() if (path / EVENTS_FILE).is_file()}
        fleets = {name for name, path in found.items() if (path / FLEET_FILE).is_file()}
        removed = sorted((self.runs.keys() - runs) | (self.fleets.keys() - fleets))
        added = sorted((runs - self.runs.keys()) | (fleets - self.fleets.keys()))
        self.runs = {name: self.runs.get(name) or Run(name, found[name], self._now) for name in sorted(runs)}
        self.fleets = {name: self.fleets.get(name) or Fleet(name, found[name]) for name in sorted(fleets)}
        return added, removed

    def _read(self) -> tuple[list[str], bool]:
        """(names of runs that changed, whether files hold more): each run in its turn until the budget is spent."""
        runs, changed, left = list(self.runs.values()), list[str](), _BUDGET
        first = self._next % len(runs) if runs else 0
        for run in (*runs[first:], *runs[:first]):
            if left <= 0:
                return changed, True
            if run.poll(min(AT_ONCE, left)):
                changed.append(run.name)
            left -= run.taken
            self._next += 1
        return changed, any(run.behind for run in runs)

    def overall(self, names: Iterable[str] | None = None) -> Overall:
        """How far runs are together: those of ``names``, of which some may not have begun, or all."""
        names = list(self.runs) if names is None else list(names)
        return overall_of([self.runs.get(name) for name in names])

    def history(self, names: Iterable[str] | None = None, points: int = 500) -> list[tuple[float, float]]:
        """(time, share of :meth:`overall`) as events told it, at most ``points`` of them, the newest among them."""
        names = list(self.runs) if names is None else list(names)
        marks = sorted(
            (told, index, min(1.0, iteration / steps))
            for index, run in enumerate(map(self.runs.get, names))
            if run is not None and (steps := run.train_iters) is not None
            for told, iteration in run.marks
        )
        shares, total, found = [0.0] * len(names), 0.0, list[tuple[float, float]]()
        for told, index, share in marks:
            total += share - shares[index]
            shares[index] = share
            found.append((told, total / len(names)))
        step = max(1, -(-len(found) // points))
        return found[::-1][::step][::-1]


def overall_of(runs: Sequence[Run | None]) -> Overall:
    """How far ``runs`` are together; None is one that has not begun."""
    status = [Status.WAITING if run is None else run.status for run in runs]
    shares = [0.0 if run is None else run.share or 0.0 for run in runs]
    return Overall(
        len(runs),
        status.count(Status.COMPLETED),
        status.count(Status.RUNNING),
        status.count(Status.STOPPED),
        sum(one in _FAILED for one in status),
        sum(shares) / len(shares) if shares else 0.0,
        _eta(runs, status),
    )


def _eta(runs: Sequence[Run | None], status: Sequence[Status]) -> float | None:
    """Seconds until all are complete that run or wait, as many at once as run now: a bound from their work, and the
    longest of them. What waits is taken for the mean of what has a pace."""
    open_ = (Status.RUNNING, Status.WAITING)
    going = [run for run, one in zip(runs, status, strict=True) if one in open_]
    left = [run.eta_seconds for run in going if run is not None and run.eta_seconds is not None]
    whole = [
        run.seconds_per_step * run.train_iters
        for run in runs
        if run is not None and run.seconds_per_step is not None and run.train_iters is not None
    ]
    unknown = len(going) - len(left)
    if not going:
        return 0.0
    if unknown and not whole:
        return None
    left += [sum(whole) / len(whole)] * unknown if unknown else []
    return max(max(left), sum(left) / max(1, status.count(Status.RUNNING)))


def _directories(top: Path, depth: int) -> Iterator[tuple[str, Path]]:
    """(path below ``top``, directory) of those that may hold runs: no checkpoints, hidden ones or links."""
    waiting = [(".", top, depth)]
    while waiting:
        name, path, left = waiting.pop()
        yield name, path
        if left:
            inner = filter(_may_hold_runs, _entries(path))
            waiting += [(_join(name, one.name), Path(one.path), left - 1) for one in inner]


def _entries(path: Path) -> list[os.DirEntry[str]]:
    """What is in a directory that may go at any moment."""
    try:
        with os.scandir(path) as found:
            return list(found)
    except OSError:
        return []


def _may_hold_runs(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) and not entry.name.startswith((".", "step_"))
    except OSError:
        return False
