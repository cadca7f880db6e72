"""The folder for the next phase: written once the run is complete, and again from its checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.phase_interface import export_phase6
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from tests.training.tiny import dense_arguments, make_trainer, weights, write_dataset
from tools import phase_interface


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

    arguments = ["export", "--load", str(tmp_path / "run"), "--output", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", ["phase_interface.py", *arguments])
    assert phase_interface.main() == 0 and "written from step 6" in capsys.readouterr().out
    again = torch.load(tmp_path / "again" / "trained_model.pt", weights_only=True)
    assert again["training_results"] == results and again["model_state_dict"].keys() == weights(trainer).keys()
    assert export_phase6(open_source(tmp_path / "run"), tmp_path / "again") == tmp_path / "again"


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
