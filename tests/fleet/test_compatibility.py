"""Source 002's group on compatibility: its names, its defaults, and what they mean to our scripts."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import megaforge.fleet as fleet
from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.fleet import CognateCreator, TrainingConfig
from megaforge.fleet import creator as module
from megaforge.fleet.model import Model
from megaforge.fleet.recipe import read_fleet
from megaforge.planning.size_command import sizes

DEFAULTS = {
    "model_type": "planner",
    "model_size": 100_000,
    "learning_rate": 0.001,
    "batch_size": 32,
    "epochs": 100,
    "grokfast_enabled": False,
    "grokfast_alpha": 0.98,
    "grokfast_lambda": 2.0,
    "dataset": "synthetic",
    "checkpoint_interval": 10,
    "training_mode": "series",
    "max_parallel_workers": 3,
}


def parsed(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The configurations of the three models, as the fleet would read them; nothing is trained."""
    asked: list[list[str]] = []

    class Done:
        returncode = 0

    def run(line: list[str], **options: object) -> Done:
        asked.append(line)
        return Done()

    monkeypatch.setattr(module.subprocess, "run", run)
    creator = CognateCreator(config)
    monkeypatch.setattr(creator, "_described", lambda directory, names: [str(directory / name) for name in names])
    assert creator.create_three_models(tmp_path) == [str(tmp_path / f"{config.model_type}_{n}") for n in (1, 2, 3)]
    assert asked[0][1:3] == ["-m", "megaforge.fleet"]
    found = read_fleet(str(tmp_path / "fleet.yaml"))
    return [Model(one, tmp_path).check().config for one in found.models]


def test_defaults() -> None:
    config = CognateCreator().config
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert [one.name for one in fields(TrainingConfig)][: len(DEFAULTS)] == list(DEFAULTS)


def test_names() -> None:
    for name in fleet.__all__:
        assert getattr(fleet, name).__doc__
    assert list(inspect.signature(fleet.create_cognate_models).parameters) == ["save_dir", "training_mode"]
    assert list(inspect.signature(CognateCreator.create_three_models).parameters)[1:] == ["save_dir", "training_mode"]


def test_a_configuration_is_kept() -> None:
    config = TrainingConfig(model_type="memory", learning_rate=0.002, batch_size=64, epochs=50, grokfast_enabled=True)
    assert CognateCreator(config).config is config


def test_what_the_default_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = parsed(TrainingConfig(), tmp_path, monkeypatch)
    assert [config.training.seed for config in configs] == [1, 2, 3]  # type: ignore[attr-defined]
    config = configs[0]
    assert config.training.train_iters == 1000 and config.checkpoint.save_interval == 100  # type: ignore[attr-defined]
    assert config.optimizer.lr == 0.001 and config.training.global_batch_size == 32  # type: ignore[attr-defined]
    assert config.optimizer.grokfast is None  # type: ignore[attr-defined]
    assert abs(sizes(config.model)[0] / 100_000 - 1) < 0.3  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["planner", "reasoner", "memory"])
def test_types_and_sizes(kind: str) -> None:
    for size in (30_000, 1_000_000):
        flags = {**TrainingConfig(model_type=kind, model_size=size).widths(), "vocab_size": 64, "mock_data": ""}
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value)) if word]
        model = parse_config(words).config.model
        assert 0.5 < sizes(model)[0] / size < 2


def test_grokfast_and_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = TrainingConfig(grokfast_enabled=True, grokfast_lambda=1.5).flags()
    assert (flags["grokfast"], flags["grokfast_alpha"], flags["grokfast_lambda"]) == ("ema", 0.98, 1.5)
    flags = TrainingConfig(dataset="corpus/train", tokenizer_model="999", epochs=3).flags()
    assert flags["data_path"] == "corpus/train" and flags["train_epochs"] == 3 and "train_iters" not in flags
    assert flags["save_interval_epochs"] == 3 and flags["tokenizer_model"] == "999"


def test_a_mode_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="training_mode 'invalid': choose one of series, parallel"):
        CognateCreator().create_three_models("nowhere", training_mode="invalid")
    for wrong in (
        {"training_mode": "x"},
        {"model_type": "x"},
        {"epochs": 0},
        {"tokenizer_model": "x"},
        {"max_parallel_workers": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CognateCreator(TrainingConfig(**wrong)).create_three_models("nowhere")  # type: ignore[arg-type]


def test_parallel_is_asked_for_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        CognateCreator, "_train", lambda self, directory, mode, workers: asked.append((mode, workers)) or []
    )
    monkeypatch.setattr(module, "get_optimal_workers", lambda requested, manager=None: (min(requested, 2), "room"))
    CognateCreator(TrainingConfig(training_mode="parallel")).create_three_models(tmp_path)
    CognateCreator(TrainingConfig(max_parallel_workers=1)).create_three_models(tmp_path, "parallel")
    CognateCreator(TrainingConfig(training_mode="parallel")).create_three_models(tmp_path, "series")
    assert asked == [("parallel", 2), ("parallel", 1), ("series", 1)]
    with pytest.raises(UserError, match="cannot be written"):
        monkeypatch.undo()
        CognateCreator().create_three_models("/proc/none")
