"""A run raises each alert that it can see of itself, and says when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.phase_interface import Compliance
from megaforge.config.compliance_config import ComplianceConfig
from megaforge.errors import UserError
from megaforge.monitor import disks
from megaforge.monitor.events import read_events
from megaforge.nn.moe.router import Router
from megaforge.parallel.param_spec import named_specs
from megaforge.training import compliance_stage, machine_room
from megaforge.training.alerting import Alerts
from megaforge.training.callbacks import Callback
from megaforge.training.compliance_stage import ComplianceStage
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_trainer, write_dataset

SECONDS = 0.01


class Trouble(Callback):
    """Spoils a run from within: a gradient, the last norm, the routers' biases."""

    spoiled = 25  # the step whose gradient is not finite

    def on_step_start(self, trainer: Trainer) -> None:
        step = trainer.iteration + 1
        norm = next(parameter for spec, parameter in named_specs(trainer.model) if spec.name == "final_norm.weight")
        if step in (30, 31):
            norm.data.mul_(50.0 if step == 30 else 1 / 50.0)
        for module in trainer.model.modules():
            if isinstance(module, Router) and step in (45, 60):
                assert module.expert_bias is not None
                module.expert_bias.data.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]) * (step == 45))

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.iteration + 1 == self.spoiled:
            next(parameter for _, parameter in named_specs(trainer.model)).main_grad.view(-1)[-1] = float("nan")  # type: ignore[attr-defined]


def alerts_of(save: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(save / "events.jsonl").events if event["kind"] == "alert"]


def test_each_is_raised_and_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = ("--hybrid-layer-pattern", "RE", "--moe-router-score-function", "sigmoid", "--train-iters", "110")
    flags += ("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "1e-9", "--lr", "1e-5")
    flags += ("--skip-nonfinite-steps", "1", "--alert-window", "16", "--save", str(save), "--save-interval", "0")
    trainer = make_trainer(arguments(prefix, *flags, "--alerts-off", "compliance"))
    timed = trainer._timed_step

    def step(batches: Any) -> Any:
        """Times that no machine changes."""
        return timed(batches).after(2 * SECONDS if 75 <= trainer.iteration < 90 else SECONDS)

    def full(at: int) -> float:
        return 0.95 if trainer.iteration == at else 0.5

    monkeypatch.setattr(trainer, "_timed_step", step)
    monkeypatch.setattr(machine_room, "host_memory_share", lambda: full(20))
    monkeypatch.setattr(disks, "_share", lambda path: full(22))
    trainer.add(Trouble())
    trainer.train()
    told = {(event["alert"], event["state"]): event for event in alerts_of(save)}
    assert len(told) == len(alerts_of(save)) == 12, told.keys()
    when = {key: event["iteration"] for key, event in told.items()}
    assert (when["memory", "firing"], when["memory", "resolved"]) == (20, 21)
    assert (when["disk", "firing"], when["disk", "resolved"]) == (22, 23)
    assert (when["nan", "firing"], when["nan", "resolved"]) == (25, 35)
    assert (when["loss_spike", "firing"], when["loss_spike", "resolved"]) == (30, 40)
    assert (when["expert_collapse", "firing"], when["expert_collapse", "resolved"]) == (54, 69)
    assert 75 < when["throughput", "firing"] <= 83 and 90 < when["throughput", "resolved"] <= 98
    assert told["disk", "firing"].items() >= {"value": 0.95, "limit": 0.9, "severity": "warning", "times": 1}.items()
    assert told["nan", "firing"]["text"] == "the gradient norm is nan at iteration 25"
    assert "ALERT loss_spike (warning): the loss spikes to" in caplog.text


def test_a_failure_is_told_and_is_over_when_the_run_goes_on(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = ("--save", str(save), "--load", str(save), "--train-iters", "4", "--run-name", "mine")
    trainer = make_trainer(arguments(prefix, *flags))

    class Failing(Callback):
        def on_step_end(self, trainer: Trainer, metrics: Any) -> None:
            raise UserError("no more\nlines")

    trainer.add(Failing())
    with pytest.raises(UserError):
        trainer.train()
    [failed] = alerts_of(save)
    assert failed["text"] == "the run ended at iteration 1 by UserError: no more" and failed["severity"] == "critical"
    make_trainer(arguments(prefix, *flags)).train()
    assert [(event["alert"], event["state"]) for event in alerts_of(save)] == [
        ("failure", "firing"),
        ("failure", "resolved"),
    ]


def test_a_gradient_that_ends_the_run_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trouble, "spoiled", 2)
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    trainer = make_trainer(arguments(prefix, "--save", str(save)))
    trainer.add(Trouble())
    with pytest.raises(UserError):
        trainer.train()
    assert [(event["alert"], event["state"]) for event in alerts_of(save)] == [("nan", "firing"), ("failure", "firing")]


def test_going_back_behind_a_spike_is_told(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    flags = ("--spike-rollback", "4", "--spike-window", "8", "--lr", "1e-5", "--train-iters", "48")
    trainer = make_trainer(arguments(prefix, *flags, "--save", str(save), "--save-interval", "0"))

    class Once(Trouble):
        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.iteration == 29 and not trainer.data.stretches:
                super().on_step_start(trainer)

        def on_gradients(self, trainer: Trainer) -> None:
            """No nan."""

    trainer.add(Once())
    trainer.train()
    [fired, over] = [event for event in alerts_of(save) if event["alert"] == "loss_spike"]
    assert "iteration 30: loss spikes to" in fired["text"] and "goes back to iteration 24" in fired["text"]
    assert over["state"] == "resolved"


@pytest.mark.parametrize("enforced", [False, True])
def test_a_report_that_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforced: bool) -> None:
    """It fires beyond the run's end, until a later report passes."""
    prefix, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    score = 0.9
    monkeypatch.setattr(
        compliance_stage, "measure_handed_on", lambda *_: (Compliance(score, score > 0.95), ["rule 5: 0.8"])
    )

    def train(steps: int) -> None:
        flags = ("--save", str(save), "--load", str(save), "--train-iters", str(steps), "--save-interval", "0")
        trainer = make_trainer(arguments(prefix, *flags))
        trainer.add(ComplianceStage(ComplianceConfig(enforced)))
        trainer.train()

    if enforced:
        with pytest.raises(UserError, match="--enforce-compliance"):
            train(1)
    else:
        train(1)
    first = alerts_of(save)
    assert [event["alert"] for event in first if event["state"] == "firing"] == ["compliance", "failure"][
        : 1 + enforced
    ]
    score = 0.96
    train(2)
    last = alerts_of(save)[-1]
    assert (last["alert"], last["state"], last["value"], last["limit"]) == ("compliance", "resolved", 0.96, 0.95)


def test_what_is_switched_off_is_never_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_dataset(tmp_path / "data")
    trainer = make_trainer(arguments(prefix, "--alerts-off", "failure", "nan"))
    [alerts] = [callback for callback in trainer.callbacks if isinstance(callback, Alerts)]
    trainer.add(Trouble())
    trainer.iteration = 4
    monkeypatch.setattr(Trouble, "spoiled", 5)
    with pytest.raises(UserError):
        trainer.train()
    assert not alerts.book.firing


def test_a_disk_is_as_full_as_df_says(tmp_path: Path) -> None:
    share = disks.disk_share([tmp_path / "not" / "there", Path("/proc/self/nothing")])
    assert 0 < share <= 1
    assert disks.disk_share([]) == 0.0
