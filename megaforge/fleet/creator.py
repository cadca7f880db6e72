"""Source 002's Python interface: three small models of one configuration with three seeds, trained by a fleet.

``CognateCreator(TrainingConfig(...)).create_three_models(DIR)`` writes ``DIR/fleet.yaml`` and runs ``python -m
megaforge.fleet`` on it, so all that the command can do holds here too: processes, retries, going on after a kill.
``docs/fleet.md`` says which of these names stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.cli import parse_config
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.fleet.model import REPO
from megaforge.fleet.progress import ProgressAggregator
from megaforge.fleet.recipe import MODES
from megaforge.fleet.report import REPORT_FILE
from megaforge.fleet.resources import ResourceManager, get_optimal_workers
from megaforge.json_text import parse_json
from megaforge.planning.size_command import nearest

MODELS = 3
STEPS_PER_EPOCH = 10  # of synthetic data, which have no end
# What a model's layers are, by its type.
PATTERNS = {"planner": "*-*-", "reasoner": "R-R-", "memory": "R-*-"}
MODULUS = 64  # of the synthetic data
FLEET_YAML = "fleet.yaml"


@dataclass
class TrainingConfig:
    """How three models are trained. Names and defaults are source 002's; the last four are ours.

    Attributes:
        model_type: planner (attention), reasoner (RWKV-7) or memory (both).
        model_size: parameters; the nearest widths are taken.
        dataset: ``synthetic`` (arithmetic progressions; an epoch is 10 steps), or the prefix of a dataset.
        checkpoint_interval: epochs between checkpoints.
        training_mode: series or parallel.
        max_parallel_workers: models at once in parallel mode, if the machine has room.
        tokenizer_model: of a dataset.
        sequence_length: tokens of a sample.
        seed: of the first model; the others have the next ones.
        fleet: further settings of ``fleet.yaml``, such as ``threads``.
    """

    model_type: str = "planner"
    model_size: int = 100_000
    learning_rate: float = 0.001
    batch_size: int = 32
    epochs: int = 100
    grokfast_enabled: bool = False
    grokfast_alpha: float = 0.98
    grokfast_lambda: float = 2.0
    dataset: str = "synthetic"
    checkpoint_interval: int = 10
    training_mode: str = "series"
    max_parallel_workers: int = 3
    tokenizer_model: str | None = None
    sequence_length: int = 32
    seed: int = 1
    fleet: dict[str, Any] | None = None

    def validate(self) -> None:
        """
        Raises:
            ValueError: a value that cannot be.
        """
        if self.training_mode not in MODES:
            raise ValueError(f"training_mode {self.training_mode!r}: choose one of {', '.join(MODES)}")
        if self.model_type not in PATTERNS:
            raise ValueError(f"model_type {self.model_type!r}: choose one of {', '.join(PATTERNS)}")
        for name in ("model_size", "batch_size", "epochs", "checkpoint_interval", "max_parallel_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if (self.dataset == "synthetic") != (self.tokenizer_model is None):
            raise ValueError(
                f"tokenizer_model {self.tokenizer_model}: a dataset needs one, and synthetic data need none"
            )

    def flags(self) -> dict[str, Any]:
        """The flags of pretrain_cdrmix.py that say the same, but for the seed."""
        found: dict[str, Any] = {
            "device": "cpu",
            **self.widths(),
            "data_path": self._data(),
            "seq_length": self.sequence_length,
            "lr": self.learning_rate,
            "micro_batch_size": self.batch_size,
            "global_batch_size": self.batch_size,
            "num_workers": 0,
            "log_interval": STEPS_PER_EPOCH,
        }
        if self.grokfast_enabled:
            found |= {"grokfast": "ema", "grokfast_alpha": self.grokfast_alpha, "grokfast_lambda": self.grokfast_lambda}
        if self.dataset == "synthetic":
            steps = STEPS_PER_EPOCH * self.epochs
            every = min(steps, STEPS_PER_EPOCH * self.checkpoint_interval)
            found |= {"vocab_size": MODULUS, "train_iters": steps, "save_interval": every}
        else:
            every = min(self.epochs, self.checkpoint_interval)
            found |= {
                "tokenizer_model": self.tokenizer_model,
                "train_epochs": self.epochs,
                "save_interval_epochs": every,
            }
        return found

    def widths(self) -> dict[str, Any]:
        """Of the layers, with which the model has about ``model_size`` parameters."""
        layers = {"num_layers": 4, "hybrid_layer_pattern": PATTERNS[self.model_type], "rwkv_head_size": 16}
        narrow = {"hidden_size": 16, "num_attention_heads": 1, "ffn_hidden_size": 32}
        vocabulary = (
            {"vocab_size": MODULUS} if self.dataset == "synthetic" else {"tokenizer_model": self.tokenizer_model}
        )
        flags = {**layers, **narrow, **vocabulary, "data_path": self._data()}
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        config, _, _ = with_run_tokenizer(parse_config(words, prog="TrainingConfig").config)
        wide = nearest(config.model, float(self.model_size), active=False)[0]
        return layers | {name: getattr(wide, name) for name in narrow}

    def _data(self) -> str:
        return f"progressions://{MODULUS}" if self.dataset == "synthetic" else self.dataset


class CognateCreator:
    """Trains three models.

    Attributes:
        config: how.
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = config or TrainingConfig()
        self._directory: Path | None = None
        self._mode = self.config.training_mode

    def create_three_models(self, save_dir: str | Path, training_mode: str | None = None) -> list[str]:
        """Trains three models below ``save_dir``; called again, it goes on where it was.

        Args:
            training_mode: in place of the configuration's.

        Returns:
            The directory of each model; beside each, ``DIRECTORY.json`` says what it is.

        Raises:
            ValueError: the configuration, or the mode, cannot be.
            UserError: a model did not become complete, or nothing could be trained there.
        """
        mode = training_mode or self.config.training_mode
        self.config.validate()
        if mode not in MODES:
            raise ValueError(f"training_mode {mode!r}: choose one of {', '.join(MODES)}")
        if mode == "parallel":
            workers = self._detect_optimal_workers(self.config.max_parallel_workers)
            return self._create_models_parallel(save_dir, workers)
        return self._create_models_series(save_dir)

    def _create_models_series(self, save_dir: str | Path) -> list[str]:
        return self._train(Path(save_dir), "series", 1)

    def _create_models_parallel(self, save_dir: str | Path, workers: int) -> list[str]:
        return self._train(Path(save_dir), "parallel", workers)

    def _detect_optimal_workers(self, requested: int) -> int:
        """How many models this machine should train at once; 1 where it cannot be seen."""
        return min(requested, get_optimal_workers(requested, ResourceManager())[0])

    def get_training_progress(self) -> dict[str, Any]:
        """How far the models are. Any thread may ask while another one trains."""
        aggregator = ProgressAggregator(MODELS)
        if self._directory is not None and self._directory.is_dir():
            aggregator.follow(self._directory)
        overall = aggregator.get_overall_progress()
        return {"mode": self._mode, "overall_progress": overall["overall_percent"], **overall}

    def _train(self, directory: Path, mode: str, workers: int) -> list[str]:
        self.config.validate()
        self._directory, self._mode = directory, mode
        names = [f"{self.config.model_type}_{number}" for number in range(1, MODELS + 1)]
        seeds = range(self.config.seed, self.config.seed + MODELS)
        content = {
            **(self.config.fleet or {}),
            "flags": self.config.flags(),
            "models": [{"name": name, "flags": {"seed": seed}} for name, seed in zip(names, seeds, strict=True)],
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with replacing(directory / FLEET_YAML) as part:
                part.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error.strerror}); name another directory") from error
        line = [sys.executable, "-m", "megaforge.fleet", "--config", str(directory / FLEET_YAML)]
        line += ["--output", str(directory), "--mode", mode, "--workers", str(workers)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{directory}: not all models became complete:\n{done.stdout}{done.stderr}".rstrip())
        return self._described(directory, names)

    def _described(self, directory: Path, names: Sequence[str]) -> list[str]:
        """Writes what each model is beside it."""
        report = parse_json((directory / REPORT_FILE).read_bytes())
        rows = {row["name"]: row for row in report["models"]}
        for name in names:
            with replacing(directory / f"{name}.json") as part:
                metadata = {"config": asdict(self.config), "final_model": True, **rows[name]}
                part.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        return [str(directory / name) for name in names]


def create_cognate_models(save_dir: str | Path, training_mode: str | None = None) -> list[str]:
    """Three models with the default configuration."""
    return CognateCreator().create_three_models(save_dir, training_mode)
