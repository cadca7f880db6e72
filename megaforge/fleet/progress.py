"""Progress of several models as source 002's callers know it: told by them, or followed in the models' files."""

from __future__ import annotations

import statistics
import threading
import time
from enum import Enum
from pathlib import Path
from typing import Any

from megaforge.monitor.runs import Status
from megaforge.monitor.runs_folder import Runs


class TrainingPhase(Enum):
    """Where a model is."""

    INITIALIZING = "initializing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    COMPLETED = "completed"
    FAILED = "failed"


_ENDED = (TrainingPhase.COMPLETED, TrainingPhase.FAILED)
_PHASE_OF = {
    Status.WAITING: TrainingPhase.INITIALIZING,
    Status.RUNNING: TrainingPhase.TRAINING,
    Status.COMPLETED: TrainingPhase.COMPLETED,
    Status.STOPPED: TrainingPhase.SAVING,
    Status.SILENT: TrainingPhase.TRAINING,
    Status.FAILED: TrainingPhase.FAILED,
    Status.LOST: TrainingPhase.FAILED,
}


class ProgressAggregator:
    """How far several models are together. Any thread may call it.

    What is told to it is forgotten with the process; :meth:`follow` reads what the models' own files say, which is the
    same after any restart.
    """

    def __init__(self, total_models: int) -> None:
        """
        Raises:
            ValueError: no models.
        """
        if total_models < 1:
            raise ValueError(f"total_models {total_models}: expected at least 1")
        self.total_models = total_models
        self._lock = threading.RLock()
        self._models: dict[int, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._history: list[tuple[float, float]] = []

    def update_model_progress(
        self,
        model_id: int,
        phase: TrainingPhase,
        current_epoch: float = 0,
        total_epochs: float = 0,
        loss_value: float | None = None,
    ) -> None:
        """Takes in where a model is.

        Args:
            model_id: from 1.
            current_epoch, total_epochs: epochs (or steps) done, and to do.
            loss_value: its newest loss.

        Raises:
            ValueError: there is no such model, or the numbers cannot be.
        """
        if not 1 <= model_id <= self.total_models:
            raise ValueError(f"model_id {model_id}: expected one from 1 to {self.total_models}")
        if not (0 <= current_epoch and 0 <= total_epochs):
            raise ValueError(f"epochs {current_epoch} of {total_epochs}: expected numbers from 0")
        share = min(1.0, current_epoch / total_epochs) if total_epochs else 0.0
        if phase is TrainingPhase.COMPLETED:
            share = 1.0
        with self._lock:
            self._models[model_id] = {
                "phase": phase.value,
                "current_epoch": current_epoch,
                "total_epochs": total_epochs,
                "percent": 100 * share,
                "loss": loss_value,
            }
            self._history.append((time.time(), self._share()))

    def follow(self, directory: str | Path) -> None:
        """Takes in what the runs below ``directory`` say; those of a fleet in its order."""
        runs = Runs(directory)
        while runs.poll().behind:
            pass
        fleet = runs.fleets.get(".")
        names = list(runs.runs) if fleet is None else fleet.runs()
        for model_id, name in enumerate(names[: self.total_models], 1):
            run = runs.runs.get(name)
            if run is not None:
                steps, loss = run.train_iters or 0, run.steps.last().get("loss")
                self.update_model_progress(model_id, _PHASE_OF[run.status], run.iteration, steps, loss)

    def _share(self) -> float:
        return sum(one["percent"] for one in self._models.values()) / 100 / self.total_models

    def _in_phase(self, *phases: TrainingPhase) -> list[int]:
        names = {phase.value for phase in phases}
        return [model_id for model_id, one in self._models.items() if one["phase"] in names]

    def get_overall_progress(self) -> dict[str, Any]:
        """Everything as JSON. ``eta_seconds`` is None before any progress; it takes the pace so far to last."""
        with self._lock:
            share, elapsed = self._share(), time.monotonic() - self._began
            completed, failed = self._in_phase(TrainingPhase.COMPLETED), self._in_phase(TrainingPhase.FAILED)
            return {
                "overall_percent": 100 * share,
                "total_models": self.total_models,
                "completed_models": len(completed),
                "failed_models": len(failed),
                "active_models": len(self._models) - len(completed) - len(failed),
                "completion_rate": len(completed) / self.total_models,
                "elapsed_seconds": elapsed,
                "eta_seconds": elapsed * (1 - share) / share if share else None,
                "models": {model_id: dict(one) for model_id, one in sorted(self._models.items())},
            }

    def history(self) -> list[tuple[float, float]]:
        """(time, overall share from 0 to 1) of every update."""
        with self._lock:
            return list(self._history)

    def is_training_complete(self) -> bool:
        """Whether every model has ended, well or not."""
        with self._lock:
            return len(self._in_phase(*_ENDED)) == self.total_models

    def has_failed_models(self) -> bool:
        """Whether any model failed."""
        with self._lock:
            return bool(self._in_phase(TrainingPhase.FAILED))

    def _calculate_progress_variance(self) -> float:
        """Of the models' percents: large where one is far behind."""
        with self._lock:
            return statistics.pvariance([one["percent"] for one in self._models.values()] or [0.0])

    def format_progress_message(self, training_mode: str = "series") -> str:
        """``Training 2 models in parallel: Overall 65.3%``, or ``Training model 2 of 3: Overall 40.0%``."""
        with self._lock:
            active = sorted(self._models.keys() - set(self._in_phase(*_ENDED)))
            overall = f"Overall {100 * self._share():.1f}%"
            if training_mode == "parallel":
                return f"Training {len(active)} models in parallel: {overall}"
            current = active[0] if active else min(self.total_models, len(self._models) + 1)
            return f"Training model {current} of {self.total_models}: {overall}"
