"""What ``tools/watch_runs.py`` keeps of runs: alerts that a process which is dead or stuck could not raise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaforge.monitor.events import wrong_fields
from megaforge.monitor.jsonl_tail import JsonlTail
from megaforge.monitor.runs import Run
from megaforge.monitor.watcher import ALERTS_FILE, FOLDER, FOLDER_FILE

_SECONDS = 2.0  # between looks: a folder of a thousand runs has a thousand files that are mostly not there
_MOST = 1000  # events kept of a run


class WatchersAlerts:
    """Follows the files that a watcher writes beside the events of each run, and that of the whole folder."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._looked = directory, float("-inf")
        self._tails: dict[str, JsonlTail] = {}
        self._events: dict[str, list[dict[str, Any]]] = {}

    def of(self, name: str) -> list[dict[str, Any]]:
        """The alerts of a run, or of the folder (``FOLDER``), in their order."""
        return self._events.get(name, [])

    def poll(self, runs: Mapping[str, Run]) -> list[str]:
        """Reads what is new; returns the names for which there was something."""
        if time.monotonic() - self._looked < _SECONDS:
            return []
        self._looked = time.monotonic()
        for name in self._tails.keys() - {*runs, FOLDER}:
            del self._tails[name]
            self._events.pop(name, None)
        paths = {name: run.directory / ALERTS_FILE for name, run in runs.items()}
        paths[FOLDER] = self._directory / FOLDER_FILE
        return [name for name, path in paths.items() if self._read(name, path)]

    def _read(self, name: str, path: Path) -> bool:
        tail = self._tails.setdefault(name, JsonlTail(path))
        events = [event for event in tail.read() if not wrong_fields(event)]
        if tail.again:
            self._events.pop(name, None)
        if events:
            self._events[name] = [*self._events.get(name, []), *events][-_MOST:]
        return bool(events) or tail.again
