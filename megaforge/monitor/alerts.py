"""Alerts: what is wrong with a run now, told once and not too often, and told again when it is over.

What can be wrong is known to :mod:`megaforge.monitor.alert_kinds`; who is told, to
:mod:`megaforge.monitor.alert_channels`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

EVENT = "alert"  # the kind of its events
State = Literal["firing", "resolved"]


class Finding(NamedTuple):
    """How one thing stands.

    Attributes:
        text: one sentence.
        value, limit: the number that was looked at, and the one that it was compared with, where there are such.
    """

    bad: bool
    text: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Alert:
    """What somebody is told.

    Attributes:
        alert: which kind.
        state: whether it is so now, or is over.
        severity: ``critical`` (somebody has to act) or ``warning``.
        text: one sentence.
        run: the run's name, and ``host`` who says so.
        since: when it began; ``time`` is now. In seconds since 1970.
        times: how often it has begun since it was last told: more than 1 where it came and went too quickly.
        again: whether it was told before, and lasts.
    """

    alert: str
    state: State
    severity: str
    text: str
    run: str
    host: str
    since: float
    time: float
    value: float | None = None
    limit: float | None = None
    times: int = 1
    again: bool = False

    def line(self) -> str:
        """In words: ``run tiny on h1: ALERT nan (critical): the loss is nan at iteration 12``."""
        word = "ALERT" if self.state == "firing" else "resolved:"
        notes = [self.severity] if self.state == "firing" else [f"after {_duration(self.time - self.since)}"]
        if self.again:
            notes.append(f"for {_duration(self.time - self.since)} now")
        if self.times > 1:
            notes.append(f"{self.times} times since it was last told")
        return f"run {self.run} on {self.host}: {word} {self.alert} ({', '.join(notes)}): {self.text}"

    def fields(self) -> dict[str, Any]:
        """What an event holds of it besides the log's own fields."""
        own = asdict(self)
        return {name: own[name] for name in own if name not in ("run", "host", "time")}


class Channel(Protocol):
    """Somebody who is told of alerts."""

    def tell(self, alert: Alert) -> None:
        """Tells it soon; neither waits nor raises."""
        ...

    def close(self, seconds: float) -> None:
        """Waits at most so long until what was told has arrived."""
        ...


@dataclass
class _Standing:
    """How one alert stands.

    Attributes:
        told_at: when somebody last heard that it fires; ``told``: whether they heard so of this time.
        times: how often it has begun since then.
    """

    firing: bool = False
    since: float = 0.0
    told: bool = False
    told_at: float = float("-inf")
    times: int = 0
    text: str = ""
    finding: Finding | None = field(default=None, repr=False)


class AlertBook:
    """Keeps which alerts fire, and tells the channels of what changes: of one alert at most once in ``repeat`` seconds
    that it fires, then again for as long as it does; that it is over at once, if its beginning was told. What came and
    went in between is counted, and told with the next, or at :meth:`close`."""

    def __init__(
        self,
        channels: Sequence[Channel],
        run: str,
        host: str,
        *,
        repeat: float,
        severities: Callable[[str], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``severities``: of an alert by its name."""
        self._channels, self._run, self._host = list(channels), run, host
        self._repeat, self._severity, self._clock = repeat, severities, clock
        self._standing: dict[str, _Standing] = {}

    @property
    def firing(self) -> dict[str, str]:
        """What is wrong now: the text of each alert by its name."""
        return {name: standing.text for name, standing in list(self._standing.items()) if standing.firing}

    def restore(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Goes on from where an earlier process was, by the events that it told: what fired then is over only once
        something says so."""
        for event in events:
            name = event.get("alert")
            if event.get("kind") != EVENT or not isinstance(name, str):
                continue
            standing = self._standing.setdefault(name, _Standing())
            standing.firing = standing.told = event.get("state") == "firing"
            standing.text = str(event.get("text", ""))
            if standing.firing:
                standing.told_at, standing.since = event["time"], float(event.get("since") or event["time"])

    def enter(self, name: str, finding: Finding) -> None:
        """Takes in how ``name`` stands, as often as it is looked at."""
        (self._fire if finding.bad else self._clear)(name, finding)

    def _fire(self, name: str, finding: Finding) -> None:
        now, standing = self._clock(), self._standing.setdefault(name, _Standing())
        if not standing.firing:
            standing.firing, standing.told, standing.since = True, False, now
            standing.times += 1
        standing.text = finding.text
        if not 0 <= now - standing.told_at < self._repeat:  # below 0: the clock was set back
            again = standing.told
            standing.told, standing.told_at = True, now
            self._tell(name, "firing", finding, standing, again)
            standing.times = 0

    def _clear(self, name: str, finding: Finding) -> None:
        standing = self._standing.get(name)
        if standing is None or not standing.firing:
            return
        standing.firing, standing.text = False, finding.text
        if standing.told:
            self._tell(name, "resolved", finding, standing, again=False)

    def _tell(self, name: str, state: State, finding: Finding, standing: _Standing, again: bool) -> None:
        alert = Alert(
            name,
            state,
            self._severity(name),
            finding.text,
            self._run,
            self._host,
            since=round(standing.since, 3),
            time=round(self._clock(), 3),
            value=finding.value,
            limit=finding.limit,
            times=max(1, standing.times),
            again=again,
        )
        for channel in self._channels:
            channel.tell(alert)

    def close(self, seconds: float = 10.0) -> None:
        """Tells what was counted and not told, and waits at most ``seconds`` until all has arrived."""
        for name, standing in self._standing.items():
            if standing.times and not standing.told:
                state: State = "firing" if standing.firing else "resolved"
                self._tell(name, state, Finding(standing.firing, standing.text), standing, again=False)
                standing.times, standing.told = 0, standing.firing
        until = time.monotonic() + seconds
        for channel in self._channels:
            channel.close(max(0.0, until - time.monotonic()))


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
