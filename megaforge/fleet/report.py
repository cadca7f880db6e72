"""What a fleet has given: ``fleet.json``, and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.durable import replacing
from megaforge.fleet.machine import GB
from megaforge.fleet.model import Model
from megaforge.fleet.recipe import FleetSettings
from megaforge.planning.table import table

REPORT_FILE = "fleet.json"
_ABSENT = "-"


@dataclass(frozen=True)
class Report:
    """A fleet's end.

    Attributes:
        seconds: wall time of this start of it.
        threads: of each rank.
    """

    settings: FleetSettings
    models: Sequence[Model]
    seconds: float
    threads: int

    def rows(self) -> list[dict[str, Any]]:
        """What became of each model, as JSON; those of a sweep with the lowest validation loss, or training loss,
        first."""
        found = [_row(model) for model in self.models]
        if any(model.settings.swept for model in self.models):
            found.sort(key=_loss)
        return found

    def table(self) -> str:
        """For people."""
        swept = list(dict.fromkeys(name for model in self.models for name in model.settings.swept))
        head = ["model", *swept, "state", "steps", "loss", "valid loss", "seconds", "peak GB", "attempts", "reason"]
        rows = [head]
        for row in self.rows():
            peak = row["peak_memory_bytes"]
            rows.append(
                [
                    row["name"],
                    *(row["swept"].get(name, _ABSENT) for name in swept),
                    row["state"],
                    str(row["iteration"]),
                    _number(row["loss"]),
                    _number(row["valid_loss"]),
                    f"{row['seconds']:.1f}",
                    f"{peak / GB:.2f}" if peak else _ABSENT,
                    str(row["attempts"]),
                    row["reason"][:80],
                ]
            )
        return table(rows)


def _row(model: Model) -> dict[str, Any]:
    step, evaluation = model.run.steps.last(), model.run.evaluations.last()
    saves = [event for event in model.run.events if event["kind"] == "save" and "error" not in event]
    saved = saves[-1] if saves else {}
    return {
        "name": model.name,
        "directory": str(model.directory),
        "swept": dict(model.settings.swept),
        "state": str(model.state),
        "reason": model.reason,
        "iteration": model.run.iteration,
        "train_iters": model.train_iters,
        "loss": _finite(step.get("loss")),
        "valid_loss": _finite(evaluation.get("loss")),
        "seconds": round(model.seconds, 3),
        "peak_memory_bytes": model.peak_memory,
        "attempts": model.attempts,
        "checkpoint": saved.get("path"),
        "sums": saved.get("sums"),
    }


def _loss(row: dict[str, Any]) -> float:
    found = [row[name] for name in ("valid_loss", "loss") if row[name] is not None]
    return found[0] if found else math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def write_report(output: Path, report: Report) -> None:
    """Writes ``fleet.json``, as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "mode": report.settings.mode,
        "workers": report.settings.workers,
        "threads": report.threads,
        "seconds": round(report.seconds, 3),
        "models": report.rows(),
    }
    with replacing(output / REPORT_FILE) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
