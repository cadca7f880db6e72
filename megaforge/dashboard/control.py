"""What the page may do with ``--control``: start the fleets that the command line names, and stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaforge.dashboard.feed import Feed
from megaforge.errors import UserError
from megaforge.fleet.model import STOP_FILE
from megaforge.fleet.recipe import MODES, Fleet, read_fleet
from megaforge.fleet.resources import Limits, ResourceManager
from megaforge.monitor.runs import process_is_there
from megaforge.monitor.runs_folder import FLEET_FILE

LOG_FILE = "supervisor.log"
MOST_WORKERS = 6  # of the page's slider; the command line takes more
_SECONDS_TO_START = 30.0
_TAIL = 2000  # characters of a log that an error shows


class Control:
    """Starts and stops fleets, in processes that outlive the dashboard. Any thread may call it.

    A page chooses among files that the command line named; it cannot name others, nor flags.
    """

    def __init__(self, configs: Sequence[Path], directory: Path, feed: Feed) -> None:
        """
        Args:
            configs: fleet files.
            directory: below which fleets write, each in a folder of its file's name.

        Raises:
            UserError: a file is not one of a fleet, or two have one name.
        """
        self._directory, self._feed, self._lock = directory, feed, threading.Lock()
        self._fleets: dict[str, tuple[Path, Fleet]] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        for path in configs:
            if path.stem in self._fleets:
                raise UserError(f"--control {path}: {self._fleets[path.stem][0]} has the same name; rename one")
            self._fleets[path.stem] = path, read_fleet(str(path))

    def offers(self) -> dict[str, Any]:
        """The fleets that may be started, and what this machine is good for."""
        report = ResourceManager().generate_resource_report()["recommendations"]
        fleets = [
            {
                "name": name,
                "file": str(path),
                "models": [model.name for model in fleet.models],
                "mode": fleet.settings.mode,
                "workers": min(fleet.settings.workers, MOST_WORKERS),
            }
            for name, (path, fleet) in self._fleets.items()
        ]
        return {"fleets": fleets, "modes": list(MODES), "most_workers": MOST_WORKERS, "suggestion": report}

    def check(self, name: str, mode: str, workers: int) -> dict[str, Any]:
        """How many models may run at once of those asked for, and why.

        Raises:
            UserError: there is no such fleet or mode, or no such number.
        """
        _, fleet = self._known(name)
        if mode not in MODES:
            raise UserError(f"mode {mode!r:.80}: expected {' or '.join(MODES)}")
        if not 1 <= workers <= MOST_WORKERS:
            raise UserError(f"workers {workers}: must be from 1 to {MOST_WORKERS}")
        if mode == "series":
            return {"workers": 1, "reason": "one model after the other", "warning": False}
        settings = fleet.settings
        limits = Limits(
            settings.memory_per_worker_gb, settings.cpus_per_worker, settings.high_load, settings.min_free_memory_gb
        )
        allowed, reason = ResourceManager(limits).validate_worker_count(workers)
        return {"workers": allowed, "reason": reason, "warning": allowed < workers}

    def start(self, name: str, mode: str, workers: int) -> dict[str, Any]:
        """Starts a fleet; returns once its supervisor has said that it runs.

        Raises:
            UserError: it runs already, or ended at once; with what it said.
        """
        path, _ = self._known(name)
        self.check(name, mode, workers)
        with self._lock:
            output = self._directory / name
            if self._is_running(name):
                raise UserError(f"fleet {name}: it runs already, in {output}; stop it first")
            output.mkdir(parents=True, exist_ok=True)
            words = ["--config", str(path), "--output", str(output), "--mode", mode, "--workers", str(workers)]
            told, log = _size(output / FLEET_FILE), output / LOG_FILE
            with log.open("ab") as file:
                begins = file.tell()
                child = subprocess.Popen(
                    [sys.executable, "-m", "megaforge.fleet", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self._children = [one for one in (*self._children, child) if one.poll() is None]
            until = time.monotonic() + _SECONDS_TO_START
            while _size(output / FLEET_FILE) <= told and time.monotonic() < until:
                if (status := child.poll()) not in (None, 0):
                    raise UserError(f"fleet {name} ended with status {status}: {_end_of(log, begins)}")
                time.sleep(0.05)
            return {"fleet": name, "pid": child.pid, "output": str(output)}

    def stop(self, name: str) -> dict[str, Any]:
        """Asks a fleet's supervisor to let its models save and end.

        Raises:
            UserError: it is not running on this machine.
        """
        start = self._feed.fleet_start(name)
        if not start or not process_is_there(start):
            raise UserError(f"fleet {name}: it is not running on this machine")
        os.kill(start["pid"], signal.SIGTERM)
        return {"fleet": name}

    def stop_model(self, run: str) -> dict[str, Any]:
        """Asks the supervisor to let one model save and end; the others go on.

        Raises:
            UserError: it is not a model of a fleet that runs.
        """
        if not any(fleet["alive"] and run in fleet["runs"] for fleet in self._feed.fleets().values()):
            raise UserError(f"run {run!r:.200}: it is not a model of a fleet that runs")
        with self._feed.run(run) as found:
            (found.directory / STOP_FILE).touch()
        return {"run": run}

    def _known(self, name: str) -> tuple[Path, Fleet]:
        if name not in self._fleets:
            known = ", ".join(self._fleets)
            raise UserError(f"fleet {name!r:.200}: there is none of this name; --control names {known}")
        return self._fleets[name]

    def _is_running(self, name: str) -> bool:
        fleet = self._feed.fleets().get(name)
        return fleet is not None and bool(fleet["alive"])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _end_of(log: Path, begins: int) -> str:
    with log.open("rb") as file:
        file.seek(begins)
        return file.read().decode(errors="replace").strip()[-_TAIL:]
