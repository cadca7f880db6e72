"""What is seen of a run in its files by another process: that it failed, that it tells nothing, that its record is
broken (:meth:`megaforge.monitor.alert_kinds.AlertKind.of_files`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.monitor.alerts import Finding
from megaforge.monitor.audit import AUDIT_FILE, BrokenTrailError, read_trail
from megaforge.monitor.runs import Run, Status

REPORT_FILE = "compliance.json"  # of tools/compliance_report.py
_GONE = (Status.FAILED, Status.LOST)
_OPEN = (Status.RUNNING, Status.SILENT)


class FileRule(Protocol):
    """Looks at one thing of one run; each run has a rule of its own."""

    def look(self, run: Run) -> Finding | None:
        """How it stands now; None: the files do not tell."""
        ...


class Failure:
    """The run said that it failed, or its process has gone without a word."""

    def look(self, run: Run) -> Finding | None:
        if run.status is Status.LOST:
            text = f"its process (pid {run.start.get('pid')} on {run.start.get('host')}) is gone without a word"
            return Finding(True, f"{text}, after iteration {run.iteration}")
        if run.status is Status.FAILED:
            return Finding(True, f"the run ended at iteration {run.iteration} by {run.reason}")
        words = {
            Status.RUNNING: f"the run goes on, at iteration {run.iteration}",
            Status.COMPLETED: "the run is complete",
            Status.STOPPED: f"the run was asked to end, at iteration {run.iteration}",
        }
        return Finding(False, words[run.status]) if run.status in words else None


class Silence:
    """Neither events nor metrics of a run that has not ended, for some minutes: it hangs, or its machine is gone."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes

    def look(self, run: Run) -> Finding | None:
        if run.status not in _OPEN:
            return None if run.status is Status.WAITING else Finding(False, "the run has ended")
        told = [run.last_event_time or 0.0, *map(_changed, (run.directory / "events.jsonl", run.metrics_path))]
        quiet = (time.time() - max(told)) / 60
        there = "its process is there" if run.status is Status.RUNNING else "its machine is another one"
        text = f"nothing was heard of the run for {quiet:.1f} minutes, at iteration {run.iteration} ({there})"
        if quiet <= self._minutes:
            text = f"the run tells that it is at iteration {run.iteration}"
        return Finding(quiet > self._minutes, text, round(quiet, 2), self._minutes)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Compliance:
    """A broken audit trail, one that has lost what was read of it before, or a compliance report that does not pass.
    Files are read when they have changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._problems: dict[str, str | None] = {}
        self._head: tuple[str, int, str] | None = None  # of the trail as it was last whole: name, records, hash

    def look(self, run: Run) -> Finding | None:
        for name, look in ((AUDIT_FILE, self._trail), (REPORT_FILE, _report)):
            path = run.directory / name
            try:
                found = path.stat()
            except OSError:
                self._gone(name)
                continue
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
            if self._seen.get(name) != state:
                self._seen[name], self._problems[name] = state, look(path)
        if not self._problems:
            return None
        wrong = [problem for problem in self._problems.values() if problem is not None]
        return Finding(bool(wrong), "; ".join(wrong) or "audit trail and compliance report hold")

    def _gone(self, name: str) -> None:
        if self._seen.pop(name, None) is None:
            return
        self._problems.pop(name)
        if name == AUDIT_FILE:
            self._problems[name] = f"{name} is gone"

    def _trail(self, path: Path) -> str | None:
        try:
            trail = read_trail(path)
        except BrokenTrailError as error:
            return f"the audit trail is broken: {error}"
        except UserError as error:
            return str(error)
        head, count = self._head, len(trail.records)
        if head is not None and head[0] == trail.name and (count < head[1] or trail.hashes[head[1] - 1] != head[2]):
            return f"the audit trail is broken: {path} had {head[1]} records and has {count} others or fewer"
        self._head = trail.name, count, trail.hashes[-1]
        return None


def _report(path: Path) -> str | None:
    try:
        report: Any = parse_json(path.read_bytes())
        passed, score, asked = report["passed"], float(report["score"]), report["asked"]
        lacking = [str(one) for one in report["lacking"]]
        words = f"the score is {score:.4f} (asked: {asked['level']}, {float(asked['score']):g})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.name} cannot be read as a compliance report ({type(error).__name__}: {error})"
    return None if passed is True else f"{path.name}: {words}; lacking: {'; '.join(lacking[:3]) or 'nothing is named'}"
