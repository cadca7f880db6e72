"""The trackers' sinks, against stand-ins for the packages that need an account or a server."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaforge.errors import UserError
from megaforge.monitor.trackers import MlflowSink, TensorBoardSink, WandbSink


class FakeWandb(types.ModuleType):
    """Records what a run is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        return self

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_runs_offline_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    sink = WandbSink("project", "name", {"seed": 1})
    sink.write("step", 3, {"loss": 2.5})
    sink.write("evaluation", 3, {"loss": 2.25})
    sink.close()
    assert fake.settings == {"project": "project", "name": "name", "config": {"seed": 1}, "mode": "offline"}
    assert fake.logged == [{"train/loss": 2.5, "iteration": 3}, {"valid/loss": 2.25, "iteration": 3}]
    assert fake.finished
    monkeypatch.setenv("WANDB_API_KEY", "x")
    WandbSink("project", None, {}, str(tmp_path / "kept"), "team")
    assert fake.settings["mode"] == "online" and (tmp_path / "kept").is_dir()
    assert (fake.settings["dir"], fake.settings["entity"]) == (str(tmp_path / "kept"), "team")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--wandb-save-dir {tmp_path}/file/x: cannot be made"):
        WandbSink("project", None, {}, str(tmp_path / "file" / "x"))


def test_mlflow_gets_parameters_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake = types.ModuleType("mlflow")
    for name in ("set_experiment", "start_run", "log_params", "log_text", "log_metrics", "end_run"):
        setattr(fake, name, lambda *args, name=name, **kwargs: calls.append((name, args, kwargs)))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    sink = MlflowSink("experiment", None, {"name": "tiny", "model": {"hidden_size": 64}})
    sink.write("step", 7, {"loss": 1.5, "tokens": 10})
    sink.close()
    assert ("log_params", ({"name": "tiny", "model.hidden_size": "64"},), {}) in calls
    assert ("log_text", ("name: tiny\nmodel:\n  hidden_size: 64\n", "config.yaml"), {}) in calls
    assert ("log_metrics", ({"train/loss": 1.5, "train/tokens": 10.0},), {"step": 7}) in calls
    assert calls[-1][0] == "end_run"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resume in ((1, 4, 0), (3, 5, 2)):
        sink = TensorBoardSink(str(tmp_path), resume, {"data": {"data_path": ("a", "b")}})
        for iteration in range(first, last + 1):
            sink.write("step", iteration, {"loss": 1.0 / iteration + resume})
        sink.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    [text] = {event.tensor_proto.string_val[0].decode() for event in read.Tensors("config/text_summary")}
    assert yaml.safe_load(text.replace("\n    ", "\n").removeprefix("    ")) == {"data": {"data_path": ["a", "b"]}}
    events = read.Scalars("train/loss")
    assert [(e.step, round(e.value, 5)) for e in events] == [
        (1, 1.0),
        (2, 0.5),
        *((i, round(1 / i + 2, 5)) for i in (3, 4, 5)),
    ]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb-project needs .* 'megaforge\[track\]'"):
        WandbSink("project", None, {})


def test_tensorboard_refuses_a_file_and_tells_of_an_earlier_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "notes.txt").write_text("buy milk")
    with pytest.raises(UserError, match="notes.txt: is a file; name a directory"):
        TensorBoardSink(str(tmp_path / "notes.txt"), None, {})
    assert (tmp_path / "notes.txt").read_text() == "buy milk"
    first = TensorBoardSink(str(tmp_path / "events"), None, {})
    first.close()
    again, continued = (TensorBoardSink(str(tmp_path / "events"), resume, {}) for resume in (None, 3))
    assert first.notice is None and continued.notice is None
    assert again.notice is not None and "events of an earlier run" in again.notice
    again.close()
    continued.close()
