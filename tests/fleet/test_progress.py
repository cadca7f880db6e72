"""Source 002's group on progress: told by callers, or followed in files."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megaforge.fleet.progress import ProgressAggregator, TrainingPhase
from megaforge.monitor.events import EventLog
from tests.monitor.test_runs import GONE, HERE
from tests.monitor.test_runs_folder import START, told


def test_progress_of_several_models() -> None:
    aggregator = ProgressAggregator(total_models=3)
    assert aggregator.get_overall_progress()["eta_seconds"] is None
    aggregator.update_model_progress(model_id=1, phase=TrainingPhase.TRAINING, current_epoch=50, total_epochs=100)
    aggregator.update_model_progress(2, TrainingPhase.INITIALIZING)
    progress = aggregator.get_overall_progress()
    assert progress["overall_percent"] == pytest.approx(50 / 3) and progress["total_models"] == 3
    assert progress["models"][1]["percent"] == 50 and progress["active_models"] == 2
    assert progress["eta_seconds"] >= 0


def test_completion_and_failure() -> None:
    aggregator = ProgressAggregator(2)
    aggregator.update_model_progress(1, TrainingPhase.COMPLETED, 3, 100)
    assert not aggregator.is_training_complete() and not aggregator.has_failed_models()
    aggregator.update_model_progress(2, TrainingPhase.FAILED, 10, 100)
    assert aggregator.is_training_complete() and aggregator.has_failed_models()
    assert aggregator.get_overall_progress()["overall_percent"] == pytest.approx(55)
    assert aggregator.get_overall_progress()["completion_rate"] == 0.5


def test_messages() -> None:
    aggregator = ProgressAggregator(3)
    assert aggregator.format_progress_message("series") == "Training model 1 of 3: Overall 0.0%"
    aggregator.update_model_progress(1, TrainingPhase.COMPLETED, 100, 100)
    aggregator.update_model_progress(2, TrainingPhase.TRAINING, 66, 100)
    assert aggregator.format_progress_message("series") == "Training model 2 of 3: Overall 55.3%"
    aggregator.update_model_progress(3, TrainingPhase.TRAINING, 30, 100)
    assert aggregator.format_progress_message("parallel") == "Training 2 models in parallel: Overall 65.3%"


def test_history_spread_and_what_cannot_be() -> None:
    aggregator = ProgressAggregator(3)
    for model_id, epoch in enumerate((10, 50, 90), 1):
        aggregator.update_model_progress(model_id, TrainingPhase.TRAINING, epoch, 100)
    assert aggregator._calculate_progress_variance() == pytest.approx(3200 / 3)
    assert [share for _, share in aggregator.history()] == pytest.approx([0.1 / 3, 0.2, 0.5])
    for model_id, epochs in ((0, (1, 2)), (4, (1, 2)), (1, (-1, 2)), (1, (1, -2))):
        with pytest.raises(ValueError, match="expected"):
            aggregator.update_model_progress(model_id, TrainingPhase.TRAINING, *epochs)
    with pytest.raises(ValueError, match="total_models 0"):
        ProgressAggregator(0)
    threads = [
        threading.Thread(target=aggregator.update_model_progress, args=(one % 3 + 1, TrainingPhase.TRAINING, one, 100))
        for one in range(90)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(aggregator.history()) == 93


def test_files_are_followed_and_say_the_same_after_a_restart(tmp_path: Path) -> None:
    models = [{"name": name, "train_iters": 100} for name in ("z", "a", "m")]
    EventLog(tmp_path / "fleet.jsonl").tell("fleet_start", models=models, **HERE)
    told(tmp_path / "z", (1.0, "start", 0, START), (2.0, "progress", 50, {}))
    told(tmp_path / "a", (1.0, "start", 0, {**START, **GONE}), (2.0, "progress", 10, {}))
    found = []
    for _ in range(2):
        aggregator = ProgressAggregator(3)
        aggregator.follow(tmp_path)
        found.append(aggregator.get_overall_progress())
    assert found[0]["models"] == found[1]["models"] and found[0]["overall_percent"] == pytest.approx(20)
    assert {key: one["phase"] for key, one in found[0]["models"].items()} == {1: "training", 2: "failed"}
