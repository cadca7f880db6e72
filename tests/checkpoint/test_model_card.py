"""The card beside published weights says what the checkpoint knows, names what is missing, and replaces nothing."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaforge.checkpoint.manifest import sums_digest
from megaforge.checkpoint.model_card import card, card_path, write_card
from megaforge.checkpoint.sources import FileSource, open_source
from megaforge.errors import UserError
from tests.training.tiny import dense_arguments, make_trainer, write_dataset
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carded")
    prefix = write_dataset(folder / "data")
    more = ["--save", str(folder / "run"), "--eval-iters", "1", "--eval-interval", "2", "--quantize-weights", "ternary"]
    make_trainer(dense_arguments(prefix, "*-", *more)).train()
    return folder / "run"


def convert(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *line])
    return convert_checkpoint.main()


def test_a_published_file_has_a_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "model.safetensors"
    assert convert(monkeypatch, "--load", str(run), "--save", str(file), "--to", "packed") == 0
    text = (tmp_path / "model.safetensors.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {"library_name": "megaforge", "tags": ["megaforge", "packed", "ternary"]}
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text and f"{file.stat().st_size:,}" in text
    assert sums_digest(run / "step_0000006") in text and "`step_0000006`" in text
    for said in ("| iterations | 6 |", "pattern `*-`", "| weights | ternary, as trained |", "best loss on validation"):
        assert said in text, said
    assert "To be added by who publishes it: license, intended use" in text
    assert "| tokens | 1,152 |" in text and "NullTokenizer of 62 ids" in text and "| dataset 1 | digest `" in text
    file.unlink()
    (tmp_path / "model.safetensors.md").write_text("mine")
    assert convert(monkeypatch, "--load", str(run), "--save", str(file), "--to", "packed") == 0
    assert (tmp_path / "model.safetensors.md").read_text() == "mine"
    assert "is there, and stays" in capsys.readouterr().out


def test_a_published_folder_has_a_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain.safetensors"
    assert convert(monkeypatch, "--load", str(run), "--save", str(plain)) == 0 and card_path(plain).is_file()
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a").write_bytes(b"x")
    assert write_card(open_source(run), tmp_path / "folder", "hf") == tmp_path / "folder" / "README.md"
    text = (tmp_path / "folder" / "README.md").read_text()
    assert f"| `deep/a` | 1 | `{hashlib.sha256(b'x').hexdigest()}` |" in text and "library_name: transformers" in text


def test_what_is_not_known_is_not_made_up(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain.safetensors"
    assert convert(monkeypatch, "--load", str(run), "--save", str(plain)) == 0
    source = FileSource(plain)
    source.meta, source.metric = {}, None
    text = card(source, plain, "safetensors")
    assert text.count("Not known.") == 4 and "MegaForge of an unknown version" in text
    with pytest.raises(UserError, match="cannot be written"):
        write_card(source, tmp_path / "no" / "such" / "model.bin", "x")


def test_the_card_of_a_source_is_its_own(run: Path, tmp_path: Path) -> None:
    source = open_source(run)
    source.metric = 1.25
    source.meta = source.meta | {"source": {"format": "hf", "file": "x"}}
    text = card(source, run, "hf")
    assert "1.25 (lower is better)" in text and 'imported from | {"format": "hf", "file": "x"}' in text
