"""The state of all runs as messages with sequence numbers: what came after the one that a page has."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megaforge.dashboard import series
from megaforge.dashboard.watchers_alerts import WatchersAlerts
from megaforge.errors import UserError
from megaforge.monitor.alerts import EVENT
from megaforge.monitor.runs import Run
from megaforge.monitor.runs_folder import Fleet, Runs
from megaforge.monitor.watcher import FOLDER

logger = logging.getLogger(__name__)

_REMEMBERED = 1000  # runs that went; a page that has not heard of those before them gets everything anew
_MOST_ALERTS = 50
_MOST_CURVES = 64  # answers kept: fifty pages that show the same ask for the same
_SHOWN = ("loss", "lr", "tokens_per_second", "grad_norm")


class Feed:
    """Follows the runs of a folder in a thread of its own, and answers from any thread.

    Every row carries the sequence number at which it last changed, so that "what came after N" needs no history: the
    rows above N, and the names that went since. A page that knows another server's numbers (``epoch``) gets all.
    """

    def __init__(self, runs: Runs, machine: Callable[[], dict[str, Any] | None], control: bool, seconds: float) -> None:
        """
        Args:
            machine: measures the machine; called once a poll.
            control: whether pages may start and stop fleets.
            seconds: between two polls.
        """
        self._runs, self._machine, self._control, self._seconds = runs, machine, control, seconds
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dashboard-feed", daemon=True)
        self.epoch, self.sequence = secrets.token_hex(8), 0
        self._rows: dict[str, dict[str, Any]] = {}
        self._alerts: dict[str, list[dict[str, Any]]] = {}
        self._watched = WatchersAlerts(runs.directory)
        self._removed: OrderedDict[str, int] = OrderedDict()
        self._forgotten = 0  # the sequence number up to which removals are not known any more
        self._common: dict[str, Any] = {}
        self._messages: dict[int, str] = {}  # by what the page has; of this sequence number
        self._curves: OrderedDict[Any, list[dict[str, Any]]] = OrderedDict()
        self.listeners: list[Callable[[], None]] = []

    def start(self) -> None:
        """Reads all runs once, and follows them from now on."""
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        behind = False
        while not self._ended.wait(0.01 if behind else self._seconds):
            try:
                behind = self.poll()
            except Exception:  # a page without new points is better than none; the log says why
                logger.exception("the runs could not be read; trying again")
                behind = False

    def poll(self) -> bool:
        """Reads what is new; whether there is more to read at once."""
        with self._lock:
            changed = self._runs.poll()
            number = self.sequence + 1
            present = self._runs.runs
            told = self._watched.poll(present)
            for name in (*changed.added, *changed.changed, *told):
                if name in present:
                    self._alerts[name] = newest_alerts(name, [*present[name].events, *self._watched.of(name)])
                    firing = sum(alert["state"] != "resolved" for alert in self._alerts[name])
                    self._rows[name] = {**row_of(present[name]), "alerts": firing, "sequence": number}
                    self._removed.pop(name, None)
            for name in changed.removed:
                self._alerts.pop(name, None)
                if self._rows.pop(name, None) is not None:
                    self._removed[name] = number
            while len(self._removed) > _REMEMBERED:
                _, self._forgotten = self._removed.popitem(last=False)
            common = self._common_now()
            if common == self._common and not (changed.added or changed.changed or changed.removed or told):
                return changed.behind
            self._common, self.sequence, self._messages = common, number, {}
        for listener in list(self.listeners):
            listener()
        return changed.behind

    def _common_now(self) -> dict[str, Any]:
        return {
            "directory": str(self._runs.directory),
            "control": self._control,
            "overall": _as_json(self._runs.overall()),
            "fleets": {name: self._fleet_now(fleet) for name, fleet in self._runs.fleets.items()},
            "machine": self._machine(),
            "alerts": self._newest_alerts(),
        }

    def _fleet_now(self, fleet: Fleet) -> dict[str, Any]:
        """How far a fleet is, and how many of its models run at once, and why."""
        told = [event for event in fleet.events if event["kind"] in ("fleet_start", "workers")][-1:]
        now = told[0] if told else {}
        return {
            **_as_json(self._runs.overall(fleet.runs())),
            "alive": fleet.running,
            "runs": fleet.runs(),
            "mode": str(fleet.start.get("mode", "")),
            "workers": now.get("workers"),
            "reason": str(now.get("reason", "")),
        }

    def _newest_alerts(self) -> list[dict[str, Any]]:
        """Those of all runs, the open ones first and then the newest."""
        found = [alert for own in self._alerts.values() for alert in own]
        found += newest_alerts(FOLDER, self._watched.of(FOLDER))
        found.sort(key=lambda alert: (alert["state"] == "resolved", -float(alert["time"])))
        return found[:_MOST_ALERTS]

    def message(self, since: int = 0, epoch: str = "") -> tuple[int, str]:
        """(sequence number, the message as JSON) of what came after ``since``; everything where ``epoch`` is not ours,
        or what went since then is forgotten."""
        with self._lock:
            known = epoch == self.epoch and self._forgotten <= since <= self.sequence
            since = since if known and since > 0 else 0
            if since not in self._messages:
                self._messages[since] = self._message(since)
            return self.sequence, self._messages[since]

    def _message(self, since: int) -> str:
        rows = [row for row in self._rows.values() if row["sequence"] > since]
        removed = [name for name, number in self._removed.items() if number > since] if since else []
        head = {"epoch": self.epoch, "since": since, "sequence": self.sequence, "full": since == 0}
        told = {**head, "time": time.time(), "runs": rows, "removed": removed, **self._common}
        return json.dumps(told, allow_nan=False, separators=(",", ":"))

    @contextmanager
    def run(self, name: str) -> Iterator[Run]:
        """The run ``name``, which stays as it is within the block.

        Raises:
            UserError: there is none; only names that the state holds are known, so none leads elsewhere.
        """
        with self._lock:
            if name not in self._runs.runs:
                raise UserError(f"run {name!r:.200}: there is none of this name below {self._runs.directory}")
            yield self._runs.runs[name]

    def curves(self, names: Sequence[str], metrics: Sequence[str], view: series.View) -> dict[str, Any]:
        """Those ``metrics`` of the runs ``names`` that they have, and the names of all that they have; ``missing`` are
        runs that went, which a page may not have heard of yet."""
        found, known, every, missing = {}, [], dict[str, None](), []
        for name in names:
            with self._lock:
                run = self._runs.runs.get(name)
                if run is None:
                    missing.append(name)
                    continue
                every |= dict.fromkeys(series.metrics_of(run))
                stamp = (run.version, len(run.steps), len(run.evaluations))
                for metric in metrics:
                    key = (name, metric, view, stamp)
                    if key in self._curves:
                        known += self._curves[key]
                    elif (copy := series.copied(run, metric, view.axis)) is not None:
                        found[key] = copy
        for key, copy in found.items():
            made = series.curves({key[:2]: copy}, view)
            known += made
            with self._lock:
                self._curves[key] = made
                while len(self._curves) > _MOST_CURVES:
                    self._curves.popitem(last=False)
        return {"curves": known, "metrics": list(every), "missing": missing}

    def fleets(self) -> dict[str, dict[str, Any]]:
        """How far the fleets are, by their names."""
        with self._lock:
            return {name: self._fleet_now(fleet) for name, fleet in self._runs.fleets.items()}

    def fleet_start(self, name: str) -> dict[str, Any]:
        """What a fleet's supervisor told as it began; empty where there is no such fleet."""
        with self._lock:
            return dict(self._runs.fleets[name].start) if name in self._runs.fleets else {}

    def history(self, fleet: str | None) -> list[tuple[float, float]]:
        """(time, share) of the overall progress of a fleet, or of all runs.

        Raises:
            UserError: there is no such fleet.
        """
        with self._lock:
            if fleet is None:
                return self._runs.history()
            if fleet not in self._runs.fleets:
                raise UserError(f"fleet {fleet!r:.200}: there is none of this name below {self._runs.directory}")
            return self._runs.history(self._runs.fleets[fleet].runs())


def row_of(run: Run) -> dict[str, Any]:
    """What the list of runs shows of one."""
    whole = run.summary()
    own = ("name", "status", "reason", "iteration", "train_iters", "share", "seconds_per_step", "eta_seconds")
    return {
        **{name: whole[name] for name in own},
        "last_event_time": whole["last_event_time"],
        "unreadable": whole["unreadable"],
        "version": whole["version"],
        "points": len(run.steps) + len(run.evaluations),
        "last": {name: whole["step"][name] for name in _SHOWN if name in whole["step"]},
    }


def newest_alerts(run: str, events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last word on each kind of alert of a run (:mod:`megaforge.monitor.alerts`), its own or a watcher's."""
    told = sorted((event for event in events if event["kind"] == EVENT), key=lambda event: float(event["time"]))
    newest = {str(event.get("alert")): event for event in told}
    return [
        {"run": run, "alert": kind, "time": event["time"]}
        | {name: str(event.get(name, "")) for name in ("state", "severity", "text")}
        for kind, event in newest.items()
    ]


def _as_json(overall: Any) -> dict[str, Any]:
    return {**overall._asdict(), "line": overall.line()}
