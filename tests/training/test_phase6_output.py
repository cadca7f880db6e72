"""The folder for the next phase: written once the run is complete, and again from its checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.phase_interface import export_phase6
from megaforge.checkpoint.sources import open_source
from megaforge.compliance import report
from megaforge.compliance.measure import Finding
from megaforge.errors import UserError
from tests.training.tiny import dense_arguments, make_trainer, weights, write_dataset
from tools import phase_interface


@pytest.fixture(autouse=True)
def code(monkeypatch: pytest.MonkeyPatch) -> report.Report:
    """What was measured on the code, in place of measuring all of it here: nothing was wrong."""
    measured = report.Report(rules=(), gates=(("no eval", ()),), waivers=())
    monkeypatch.setattr(report, "of_own_code", lambda: measured)
    return measured


def test_a_run_hands_on_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    flags = dense_arguments(prefix, "*-", "--save", str(tmp_path / "run"), "--phase6-output", str(tmp_path / "six"))
    first = make_trainer([*flags, "--exit-interval", "2"])
    first.train()
    assert (tmp_path / "six").exists() is False and first.iteration == 2  # it is not complete
    trainer = make_trainer([*flags, "--load", str(tmp_path / "run")])
    trainer.train()
    trained = torch.load(tmp_path / "six" / "trained_model.pt", weights_only=True)
    for name, value in weights(trainer).items():
        assert torch.equal(trained["model_state_dict"][name], value)
    results = trained["training_results"]
    assert results["iterations"] == 6 and results["final_loss"] > 0 and not trained["bitnet_optimized"]
    metadata = json.loads((tmp_path / "six" / "phase5_metadata.json").read_text())
    assert metadata["training_duration_hours"] == results["training_time"] / 3600 > 0
    content = json.loads((tmp_path / "run" / report.JSON_FILE).read_text())
    assert metadata["nasa_compliance_score"] == content["score"] < 1 and trained["nasa_compliant"] is False

    arguments = ["export", "--load", str(tmp_path / "run"), "--output", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", ["phase_interface.py", *arguments])
    assert phase_interface.main() == 0 and "written from step 6" in capsys.readouterr().out
    again = torch.load(tmp_path / "again" / "trained_model.pt", weights_only=True)
    assert again["training_results"] == results and again["model_state_dict"].keys() == weights(trainer).keys()
    assert json.loads((tmp_path / "again" / report.JSON_FILE).read_text())["score"] == content["score"]
    assert export_phase6(open_source(tmp_path / "run"), tmp_path / "again") == tmp_path / "again"


ASKED = ("--enforce-compliance", "--compliance-level", "basic", "--min-compliance-score", "0.3")


def test_what_has_to_pass_is_not_handed_on_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: report.Report
) -> None:
    prefix, six = write_dataset(tmp_path / "train_text_document"), tmp_path / "six"
    flags = dense_arguments(prefix, "*-", "--save", str(tmp_path / "run"), "--phase6-output", str(six), *ASKED)
    with pytest.raises(UserError, match=r"--compliance-level basic .* is not reached.*the score is 0\.\d+, and basic"):
        make_trainer(flags).train()
    assert not six.exists() and (tmp_path / "run" / "step_0000006").is_dir()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    [told] = [event for event in events if event["kind"] == "compliance"]
    assert told["passed"] is False and 0 < told["score"] < 0.85 and told["seconds"] >= 0

    def export(*more: str) -> int:
        line = ["export", "--load", str(tmp_path / "run"), "--output", str(six), *more]
        monkeypatch.setattr(sys, "argv", ["phase_interface.py", *line])
        return phase_interface.main()

    with pytest.raises(UserError, match="is not reached"):
        export()
    assert not (six / "trained_model.pt").exists()
    assert export("--no-enforce-compliance") == 0 and "lacking: encryption: 0.000" not in capsys.readouterr().out
    assert torch.load(six / "trained_model.pt", weights_only=True)["nasa_compliant"] is False
    recorded = ["--audit-trail", "--eval-iters", "1", "--encrypt-checkpoints", "--quantize-weights", "ternary"]
    monkeypatch.setenv("MEGAFORGE_KEY", "05" * 32)
    better = [flag if flag != str(tmp_path / "run") else str(tmp_path / "better") for flag in flags]
    make_trainer([*better, *recorded]).train()
    handed = torch.load(six / "trained_model.pt", weights_only=True)
    assert handed["nasa_compliant"] is True and handed["bitnet_optimized"] is True
    monkeypatch.setattr(report, "of_own_code", lambda: replace(code, gates=(("no eval", (Finding("a:1", "x"),)),)))
    with pytest.raises(UserError, match="no eval: 1, the first at a:1"):
        export("--enforce-compliance")


def test_quantization_must_be_complete(tmp_path: Path) -> None:
    """Neither at the end of a run nor of a checkpoint on the way is a model handed on whose codes are not the last."""
    prefix = write_dataset(tmp_path / "train_text_document")
    flags = [*dense_arguments(prefix, "*-"), "--quantize-weights", "ternary", "--quant-lambda", "linear"]
    output = ["--save", str(tmp_path / "run"), "--phase6-output", str(tmp_path / "six")]
    with pytest.raises(UserError, match=r"--phase6-output .*six: after --train-iters 6 .*from iteration 9 on"):
        make_trainer([*flags, *output, "--quant-lambda-end-iters", "9"])
    make_trainer([*flags, *output, "--quant-lambda-end-iters", "4", "--exit-interval", "2"]).train()
    with pytest.raises(UserError, match="after iteration 2 its quantization is not complete"):
        export_phase6(open_source(tmp_path / "run"), tmp_path / "six")
    assert not (tmp_path / "six").exists()
