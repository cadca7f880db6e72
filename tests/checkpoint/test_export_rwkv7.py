"""RWKV-LM's files: its own package computes from them what we do, and they come back bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.export_rwkv7 import export_rwkv7
from megaforge.checkpoint.import_rwkv7 import import_rwkv7
from megaforge.checkpoint.published_import import Import
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from tests.checkpoint.published_models import train
from tests.oracles.rwkv_package import package_logits
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("rwkv7", tmp_path_factory.mktemp("rwkv7"))


def test_there_and_back(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "model.pth"
    monkeypatch.setattr(sys, "argv", ["convert", "--load", str(run), "--save", str(file), "--to", "rwkv7"])
    assert convert_checkpoint.main() == 0 and f"{file.stat().st_size:,} bytes" in capsys.readouterr().out
    import_rwkv7(Import(file, tmp_path / "again"))
    before, after = open_source(run), open_source(tmp_path / "again")
    assert len(after.tensors) > 60
    for name in after.tensors:
        kept = 62 if name in ("embedding.weight", "head.weight") else None
        assert torch.equal(before.read(name)[:kept], after.read(name)[:kept]), name
    weights = torch.load(file, weights_only=True)
    assert weights["blocks.1.att.x_r"].shape == (1, 1, 64) and not weights["blocks.0.att.v2"].any()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="it exists"):
        export_rwkv7(open_source(run), file)


def test_from_one_form_into_another(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Without a checkpoint of ours in between."""
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    export_rwkv7(open_source(run), first)
    for words in (
        ("--from", "rwkv7", str(first), "--to", "hf", "--save", str(tmp_path / "hf")),
        ("--from", "hf", str(tmp_path / "hf"), "--to", "rwkv7", "--save", str(second)),
    ):
        monkeypatch.setattr(sys, "argv", ["convert", *words])
        assert convert_checkpoint.main() == 0
    assert "continue" not in capsys.readouterr().out and {path.name for path in tmp_path.iterdir()} == {
        *("first.pth", "hf", "second.pth", "second.pth.md")
    }
    before, after = (torch.load(file, weights_only=True) for file in (first, second))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_in_another_type(run: Path, tmp_path: Path) -> None:
    export_rwkv7(open_source(run), tmp_path / "model.pth", dtype="bfloat16")
    weights = torch.load(tmp_path / "model.pth", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    key = open_source(run).read("layers.1.mixer.key.weight")
    assert torch.equal(weights["blocks.1.att.key.weight"], key.bfloat16())


@torch.no_grad()
def test_rwkv_computes_the_same(run: Path, tmp_path: Path) -> None:
    export_rwkv7(open_source(run), tmp_path / "model.pth")
    ids = [7 * i % 61 for i in range(20)]
    theirs = package_logits(tmp_path / "model.pth", ids)
    ours = load_trained_model(str(run), device="cpu").model._chunk.logits(torch.tensor([ids]))[0, :, :62]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert float(ours.std()) > 1e-3


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention layers with a dense FFN; its architectures have throughout RWKV-7"):
        export_rwkv7(open_source(train("qwen2", tmp_path)), tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()
