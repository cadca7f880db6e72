"""Compressed weights in, a trained model out: value for value, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megaforge.checkpoint.phase_interface import (
    COMPRESSED,
    COMPRESSION,
    Compliance,
    import_phase4,
    load_phase4_models,
    prepare_phase6_output,
)
from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters
from tests.training.tiny import dense_arguments, make_config, make_trainer, weights, write_dataset

MODEL = ("--vocab-size", "62", "--make-vocab-size-divisible-by", "16")
METADATA = {"compression_method": "bitnet", "bit_width": 1, "stats": {"ratio": 8.2}}


def config() -> Config:
    return make_config(dense_arguments("unused", "*-", *MODEL))


def phase4(folder: Path, wrap: Any = None, **metadata: Any) -> dict[str, torch.Tensor]:
    """A folder of phase 4 with the weights of :func:`config`'s model, the vocabulary not padded."""
    generator = torch.Generator().manual_seed(1)
    named = {
        name: torch.randn([62 if name == "embedding.weight" else spec.shape[0], *spec.shape[1:]], generator=generator)
        for name, spec in declared_parameters(config().model).items()
    }
    folder.mkdir(exist_ok=True)
    torch.save(named if wrap is None else wrap(named), folder / COMPRESSED)
    (folder / COMPRESSION).write_text(json.dumps(METADATA | metadata))
    return named


def test_phase4_is_read_and_becomes_initial_weights(tmp_path: Path) -> None:
    named = phase4(tmp_path, lambda named: {"model_state_dict": {f"module.{k}": v for k, v in named.items()}})
    read = load_phase4_models(tmp_path)
    assert read["metadata"] == METADATA and read["compression_stats"] == {"ratio": 8.2}
    assert read["weights"].keys() == named.keys()
    import_phase4(tmp_path, tmp_path / "start", config())
    prefix = write_dataset(tmp_path / "train_text_document")
    trainer = make_trainer(dense_arguments(prefix, "*-", *MODEL, "--load", str(tmp_path / "start"), "--finetune"))
    for name, value in weights(trainer).items():
        assert torch.equal(value[:62] if name == "embedding.weight" else value, named[name]), name


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"compression_method": "gptq"}, "compression_method is 'gptq'"),
        ({"bit_width": 2}, "bit_width 2"),
        ({"bit_width": True}, "bit_width True"),
        ({"bit_width": "1"}, "bit_width '1'"),
    ],
)
def test_another_compression_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    phase4(tmp_path, **metadata)
    with pytest.raises(UserError, match=message):
        load_phase4_models(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda named: {**named, "evil": Evil()}, "can read safely"),
        (lambda named: [1, 2], "something else than named tensors"),
        (lambda named: {}, "something else than named tensors"),
        (lambda named: {**named, "final_norm.weigth": torch.ones(1)}, "no parameter final_norm.weigth; did you mean"),
        (lambda named: {k: v for k, v in named.items() if "final" not in k}, "1 weights of the model are missing"),
        (lambda named: {**named, "final_norm.weight": torch.ones(3)}, r"final_norm.weight has the shape \(3,\)"),
    ],
)
def test_bad_weights_are_named(tmp_path: Path, capsys: Any, wrap: Any, message: str) -> None:
    phase4(tmp_path, wrap)
    with pytest.raises(UserError, match=message):
        import_phase4(tmp_path, tmp_path / "start", config())
    assert "executed" not in capsys.readouterr().out and not (tmp_path / "start").exists()


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compression_metadata.json: it cannot be read"):
        load_phase4_models(tmp_path)
    phase4(tmp_path)
    (tmp_path / COMPRESSION).write_text("[")
    with pytest.raises(UserError, match="not JSON"):
        load_phase4_models(tmp_path)
    (tmp_path / COMPRESSION).write_text("[]")
    with pytest.raises(UserError, match="no object"):
        load_phase4_models(tmp_path)
    phase4(tmp_path)
    (tmp_path / COMPRESSED).write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="read safely"):
        load_phase4_models(tmp_path)


def test_what_a_module_trained_is_handed_on(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    results = {"final_loss": 1.5, "training_time": 7200.0, "note": "x"}
    folder = prepare_phase6_output(model, results, tmp_path / "a" / "b")
    trained = torch.load(folder / "trained_model.pt", weights_only=True)
    assert trained["training_results"] == results and torch.equal(trained["model_state_dict"]["weight"], model.weight)
    assert (trained["phase5_complete"], trained["bitnet_optimized"], trained["nasa_compliant"]) == (True, True, False)
    metadata = json.loads((folder / "phase5_metadata.json").read_text())
    assert metadata.pop("training_completion_time").endswith("+00:00")
    assert metadata == {
        "final_loss": 1.5,
        "training_duration_hours": 2.0,
        "nasa_compliance_score": None,
        "ready_for_phase6": True,
    }
    prepare_phase6_output(model, results, tmp_path / "a" / "b", compliance=Compliance(0.9625, True))
    trained = torch.load(folder / "trained_model.pt", weights_only=True)
    metadata = json.loads((folder / "phase5_metadata.json").read_text())
    assert trained["nasa_compliant"] is True and metadata["nasa_compliance_score"] == 0.9625
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_phase6_output(model, {}, tmp_path / "file")
