"""What the page shows of one run when it is opened: its start, checkpoints, samples, audit trail, compliance."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.monitor.audit import AUDIT_FILE, BrokenTrailError, read_trail
from megaforge.monitor.events import finite
from megaforge.monitor.runs import Run
from megaforge.monitor.samples import newest_samples

COMPLIANCE_FILE = "compliance.json"
_EVENTS, _SAMPLES = 200, 50  # the newest
_LARGEST = 16 << 20  # bytes of a report that is read
_START = ("run", "host", "pid", "launcher", "layout", "version", "commit", "dirty", "metrics_file")


def detail(run: Run) -> dict[str, Any]:
    """All panels but the audit trail's, whose check reads the whole trail."""
    return {
        "name": run.name,
        "start": {name: run.start[name] for name in _START if name in run.start},
        "events": finite(run.events[-_EVENTS:][::-1]),
        "checkpoints": checkpoints(run),
        "samples": [one._asdict() for one in newest_samples(run.directory, _SAMPLES)],
        "compliance": compliance(run.directory),
    }


def checkpoints(run: Run) -> list[dict[str, Any]]:
    """Those that the run saved and that are still there, the newest first; ``sums`` is the digest of all that is in
    one, as the run told it."""
    found: dict[str, dict[str, Any]] = {}
    for event in run.events:
        name = event.get("path")
        # A name with a separator would lead elsewhere; runs write none.
        if event["kind"] == "save" and isinstance(name, str) and not event.get("error") and name == Path(name).name:
            size = _bytes_below(run.directory / name)
            if size is not None:
                found[name] = {
                    "name": name,
                    "iteration": event["iteration"],
                    "time": event["time"],
                    "sums": event.get("sums"),
                    "bytes": size,
                }
    return sorted(found.values(), key=lambda one: (one["iteration"], one["time"]), reverse=True)


def _bytes_below(directory: Path) -> int | None:
    """Of the files in a directory and those below it; None where it is not there (any more)."""
    if not directory.is_dir():
        return None
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # it went just now
                continue
    return total


def compliance(directory: Path) -> dict[str, Any] | None:
    """The heads of the run's report (:mod:`megaforge.compliance.report`), or the ``problem`` with it; None where there
    is none."""
    path = directory / COMPLIANCE_FILE
    try:
        if path.stat().st_size > _LARGEST:
            return {"problem": f"{COMPLIANCE_FILE} is larger than {_LARGEST} bytes"}
        report = parse_json(path.read_bytes())
    except OSError:
        return None
    except ValueError as error:
        return {"problem": f"{COMPLIANCE_FILE} is not JSON ({error})"}
    try:
        return {
            "made": str(report["made"]),
            "score": float(report["score"]),
            "level": report["level"] and str(report["level"]),
            "asked": str(report["asked"]["level"]),
            "passed": report["passed"] is True,
            "lacking": [str(line) for line in report["lacking"]],
            "parts": [_part(f"rule {rule['number']}: {rule['title']}", rule) for rule in report["rules"]]
            + [_part(str(control["title"]), control) for control in report["controls"]],
        }
    except (KeyError, TypeError, ValueError) as error:
        return {"problem": f"{COMPLIANCE_FILE} is not a report ({error!r:.80})"}


def _part(title: str, measured: dict[str, Any]) -> dict[str, Any]:
    share = measured["share"]
    return {"title": title, "share": None if share is None else float(share)}


def audit(directory: Path) -> dict[str, str]:
    """Whether the run's audit trail holds; ``tools/audit.py verify`` also compares it with the checkpoints."""
    path = directory / AUDIT_FILE
    if not path.exists():
        return {"state": "absent", "message": "this run keeps no audit trail (--audit-trail)"}
    try:
        trail = read_trail(path)
    except BrokenTrailError as error:
        return {"state": "broken", "message": str(error)}
    except UserError as error:
        return {"state": "broken", "message": f"it cannot be read: {error}"}
    signed = f", {trail.signed} of them signed" if trail.signed else ", none of them signed"
    return {"state": "holds", "message": f"{len(trail.records)} records hold{signed}"}


def as_json(value: Any) -> bytes:
    """Of what this module gives."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
