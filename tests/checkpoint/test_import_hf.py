"""What was exported in Hugging Face's form comes back: the same codes, steps and scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.import_hf import config_of, import_hf
from megaforge.checkpoint.packed_file import open_quantized
from megaforge.checkpoint.published_import import Import
from megaforge.checkpoint.sources import open_source
from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from tests.checkpoint.test_export_hf import TOKENS, runs
from tools import convert_checkpoint

__all__ = ["runs"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bitnet", "bitnet-relu2", "arcee"])
def test_there_and_back(runs: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    export_hf(open_source(runs[kind]), tmp_path / "hf")
    again = tmp_path / "again"
    monkeypatch.setattr(sys, "argv", ["convert", "--from", "hf", str(tmp_path / "hf"), "--save", str(again)])
    assert convert_checkpoint.main() == 0 and "--config" in capsys.readouterr().out
    before, after = open_quantized(open_source(runs[kind])), open_quantized(open_source(again))
    assert before.schemes.keys() == after.schemes.keys() != set()
    for name in before.schemes:
        ours, theirs = before.coded(name), after.coded(name)
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.step, theirs.step, rtol=1e-6, atol=0)
    scores = [load_trained_model(str(path), device="cpu").model._chunk.logits(TOKENS) for path in (runs[kind], again)]
    torch.testing.assert_close(*(score[..., :62] for score in scores), rtol=0, atol=1e-5)
    model = parse_config(["--config", str(again / "model.yaml")], prog="test").config.model
    assert model.quantize_weights == "ternary" and model.sub_norm == ("bitnet" in kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type bloom is not one of llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': llama is known with silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn: known are"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 2}}, "low_freq_factor 2: here"),
        ({"mlp_bias": True}, "attention_bias and mlp_bias differ"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method gptq"),
        ({"num_hidden_layers": 3}, "9 weights .model.layers.2.input_layernorm.weight, .*4 more. are missing"),
        ({"vocab_size": 61}, "model.embed_tokens.weight has the shape"),
        ({"hidden_size": None}, "config.json lacks or has an odd"),
    ],
)
def test_what_is_wrong_is_named(runs: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    export_hf(open_source(runs["llama"]), tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text()) | {"attention_bias": False, "mlp_bias": False} | change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_hf(Import(tmp_path / "hf", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json cannot be read"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        config_of(tmp_path)
