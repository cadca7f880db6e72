"""Goodput: what the wall time of a run went into, over all its attempts, by its events.

Between two events of a process time goes on; an event with ``seconds`` says how many of those before it went into what
it tells (a load, a save, an evaluation); where that goes on beside steps, ``stall`` says how many they waited. What
nobody told is start-up before training begins, and afterwards steps, where the iteration has risen, or else ``other``.
From the last event of a killed process to the start of the next one is ``restart``. Where the run goes back to an
earlier iteration, the steps beyond it are work that is done again: their first time counts as ``re-done``. So every
second counts once, and the shares add up to one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

STEPS, START, RESTART, AGAIN, OTHER = "steps", "start-up", "restart", "re-done", "other"
# What events with seconds count as; those of other kinds by their kind.
_COUNTS_AS = {"save_begin": "save", "evaluate": "evaluation", "test": "evaluation"}


class Goodput(NamedTuple):
    """Where a run's time went.

    Attributes:
        spent: seconds by what they went into.
        attempts: processes that the run has had.
        steps: iterations that it has reached.
    """

    spent: dict[str, float]
    attempts: int
    steps: int

    @property
    def total(self) -> float:
        """Seconds from the first process's start to the last event."""
        return sum(self.spent.values())

    @property
    def share(self) -> float:
        """Of the whole time, that of steps which counted."""
        return self.spent.get(STEPS, 0.0) / self.total if self.total else 0.0

    def lines(self) -> list[str]:
        """For people: the whole, and each part, the largest first."""
        head = (
            f"goodput {self.share:.1%}: of {_span(self.total)} in {self.attempts} attempt{'s' * (self.attempts != 1)}, "
            f"{_span(self.spent.get(STEPS, 0.0))} went into steps that count"
        )
        parts = sorted(((seconds, name) for name, seconds in self.spent.items() if name != STEPS), reverse=True)
        rest = [f"{name} {seconds / self.total:.1%} ({_span(seconds)})" for seconds, name in parts if seconds > 0]
        return [head, *(["the rest: " + ", ".join(rest)] if rest else [])]


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass
class _Piece:
    """Time between two events that none of them explains."""

    phase: str | None  # START, AGAIN, or None: steps, where there are any
    first: int  # iterations done at its beginning, and at its end
    last: int
    seconds: float

    @property
    def counts_as(self) -> str:
        return self.phase or (STEPS if self.last > self.first else OTHER)


class Accounting:
    """Takes events in their order, as they are told or from a file."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._pieces: list[_Piece] = []
        self._own = 0  # where the pieces of the newest process begin
        self._attempts = self._iteration = 0
        self._phase: str | None = None
        self._before: Mapping[str, Any] | None = None
        self._process: tuple[Any, Any] | None = None
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes in one event."""
        since = 0.0 if self._before is None else float(self._before["uptime"])
        if event["kind"] == "start":
            if not self._is_same_process(event):
                self._new_process(event)
                since = 0.0
            self._process, self._phase = (event.get("host"), event.get("pid")), START
        piece = self._piece(event["uptime"], since, event["iteration"])
        self._pieces.append(piece)
        self._spent[piece.counts_as] += piece.seconds
        if event["kind"] == "train":
            self._phase = None
        if self._phase is None:
            self._go_back(event["iteration"])
            self._iteration = event["iteration"]
        if (seconds := event.get("stall", event.get("seconds"))) is not None:
            self._take(float(seconds), _COUNTS_AS.get(event["kind"], event["kind"]))
        self._before = event

    def _piece(self, uptime: float, since: float, iteration: int) -> _Piece:
        seconds = max(0.0, uptime - since)
        if self._phase is not None or iteration < self._iteration:  # what led to going back was in vain
            return _Piece(self._phase or AGAIN, iteration, iteration, seconds)
        return _Piece(None, self._iteration, iteration, seconds)

    def _is_same_process(self, start: Mapping[str, Any]) -> bool:
        """Whether one process starts a run again, as a test or a notebook does."""
        return (
            self._before is not None
            and self._process == (start.get("host"), start.get("pid"))
            and self._before["uptime"] <= start["uptime"]
        )

    def _new_process(self, start: Mapping[str, Any]) -> None:
        if self._before is not None:  # a clock that was set back says nothing of the time between
            self._spent[RESTART] += max(0.0, start["time"] - start["uptime"] - self._before["time"])
        self._attempts += 1
        self._own = len(self._pieces)

    def _take(self, seconds: float, name: str) -> None:
        """``seconds`` before the newest event went into ``name``: other events may have been told within them."""
        for index in range(len(self._pieces) - 1, self._own - 1, -1):
            if seconds <= 0:
                break
            seconds -= self._move(self._pieces[index], seconds, name)

    def _move(self, piece: _Piece, seconds: float, name: str) -> float:
        """Counts up to so many seconds of ``piece`` as ``name``; returns how many it had."""
        moved = min(seconds, piece.seconds)
        self._spent[piece.counts_as] -= moved
        self._spent[name] += moved
        piece.seconds -= moved
        return moved

    def _go_back(self, iteration: int) -> None:
        """The run goes on from ``iteration``: what it did beyond it is done again."""
        for piece in reversed(self._pieces):  # whose iterations only rise
            if piece.phase is not None:
                continue
            if piece.last <= iteration:
                break
            if beyond := piece.last - max(piece.first, iteration):
                _ = self._move(piece, piece.seconds * beyond / (piece.last - piece.first), AGAIN)
            piece.first, piece.last = min(piece.first, iteration), iteration

    def goodput(self, uptime: float | None = None, iteration: int | None = None) -> Goodput:
        """What has been spent up to the last event, or up to ``uptime`` of its process, when ``iteration`` is done."""
        spent, reached = self._spent.copy(), self._iteration
        if uptime is not None and iteration is not None and self._before is not None:
            piece = self._piece(uptime, float(self._before["uptime"]), iteration)
            spent[piece.counts_as] += piece.seconds
            reached = iteration
        return Goodput({name: seconds for name, seconds in spent.items() if seconds > 0}, self._attempts, reached)
