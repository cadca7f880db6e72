"""Sinks over TensorBoard, Weights & Biases and MLflow. Each package is an extra, imported when its sink is made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megaforge.errors import UserError, require
from megaforge.monitor.sinks import Kind

_PREFIX = {"step": "train", "evaluation": "valid", "test": "test"}


def as_text(config: Mapping[str, Any]) -> str:
    """The configuration as YAML, as ``--config FILE`` reads it."""
    plain = json.loads(json.dumps(dict(config)))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _tagged(kind: Kind, values: Mapping[str, float | int]) -> dict[str, float | int]:
    return {f"{_PREFIX[kind]}/{name}": value for name, value in values.items()}


class TensorBoardSink:
    """TensorBoard event files; a resumed run hides what the interrupted one wrote beyond its checkpoint. The
    configuration stands under Text.

    Attributes:
        notice: what to tell the user about files that were there, or None.
    """

    def __init__(self, directory: str, resume_iteration: int | None, config: Mapping[str, Any]) -> None:
        """``resume_iteration``: where the run goes on, or None for a new one.

        Raises:
            UserError: ``directory`` is a file, or cannot be made.
        """
        protocol = require("tensorboard.compat.proto.summary_pb2", extra="train", purpose="--tensorboard-dir")
        self._summary = protocol.Summary
        writer = require("torch.utils.tensorboard", extra="train", purpose="--tensorboard-dir").SummaryWriter
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            found = any(path.name.startswith("events.out.tfevents") for path in Path(directory).iterdir())
            self._renew = partial(writer, directory)
            self._writer = self._renew(purge_step=None if resume_iteration is None else resume_iteration + 1)
        except FileExistsError as error:
            raise UserError(f"--tensorboard-dir {directory}: is a file; name a directory") from error
        except OSError as error:
            raise UserError(f"--tensorboard-dir {directory}: cannot be written ({error.strerror})") from error
        self.notice: str | None = None
        if found and resume_iteration is None:
            self.notice = (
                f"--tensorboard-dir {directory}: it holds events of an earlier run, and TensorBoard draws both as one "
                "curve; give each run a directory of its own"
            )
        indented = "".join(f"    {line}\n" for line in as_text(config).splitlines())  # Markdown's code
        self._writer.add_text("config", indented, resume_iteration or 0)

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        # One event for all: add_scalar takes a tenth of a millisecond for each.
        tagged = _tagged(kind, values).items()
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value) for name, value in tagged])
        self._writer.file_writer.add_summary(summary, iteration)

    def go_back(self, iteration: int) -> None:
        """Hides what was written of later iterations: they are made again."""
        self._writer.close()
        self._writer = self._renew(purge_step=iteration + 1)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. Without WANDB_MODE and credentials the run is kept on disk (``wandb sync`` sends it)."""

    def __init__(
        self,
        project: str,
        run_name: str | None,
        config: Mapping[str, Any],
        save_dir: str | None = None,
        entity: str | None = None,
    ) -> None:
        """
        Raises:
            UserError: ``save_dir`` cannot be made.
        """
        wandb = require("wandb", extra="track", purpose="--wandb-project")
        where: dict[str, str] = {} if entity is None else {"entity": entity}
        if save_dir is not None:
            try:
                Path(save_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--wandb-save-dir {save_dir}: cannot be made ({error.strerror})") from error
            where["dir"] = save_dir
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_credentials() else "offline")
        self._run = wandb.init(project=project, name=run_name, config=dict(config), mode=mode, **where)

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        # The tracker's own step only grows, so the iteration travels as a value of its own.
        self._run.log({**_tagged(kind, values), "iteration": iteration})

    def flush(self) -> None:
        """The client writes its own log as it goes."""

    def close(self) -> None:
        self._run.finish()


def _has_wandb_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")


class MlflowSink:
    """An MLflow run, at MLFLOW_TRACKING_URI or in the local default store."""

    def __init__(self, experiment: str, run_name: str | None, config: Mapping[str, Any]) -> None:
        self._mlflow = require("mlflow", extra="track", purpose="--mlflow-experiment")
        self._mlflow.set_experiment(experiment)
        self._mlflow.start_run(run_name=run_name)
        self._mlflow.log_params(_flat(config))
        self._mlflow.log_text(as_text(config), "config.yaml")

    def write(self, kind: Kind, iteration: int, values: Mapping[str, float | int]) -> None:
        self._mlflow.log_metrics({name: float(v) for name, v in _tagged(kind, values).items()}, step=iteration)

    def flush(self) -> None:
        """The client sends each record as it is logged."""

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's flat parameters: ``{"model.hidden_size": "768"}``."""
    out: dict[str, str] = {}
    for name, value in config.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return out
