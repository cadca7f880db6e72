"""What comes with a published model goes along: its tokenizer, its template, how it is asked to generate."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.published_import import MODEL_FILE
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.parallel.context import ParallelContext
from tests.checkpoint.published_models import train
from tools import convert_checkpoint

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": i, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(("<s>", "</s>"))
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(("<s>", "</s>", *"abcdefgh"))}, "merges": []},
}
BESIDE: dict[str, Any] = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"},
    "special_tokens_map.json": {"eos_token": "</s>"},
    "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 3, "temperature": 0.6},
}
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a published model."""
    folder = tmp_path_factory.mktemp("llama")
    export_hf(open_source(train("llama", folder)), folder / "toy")
    for name, content in BESIDE.items():
        (folder / "toy" / name).write_text(json.dumps(content))
    (folder / "toy" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "toy"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *words])
    assert convert_checkpoint.main() == 0


def test_the_tokenizer_goes_in_and_out(model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    hub, save, out = tmp_path / "hub", tmp_path / "runs" / "toy", tmp_path / "out"
    shutil.copytree(model, hub)
    run(monkeypatch, "--from", "hf", str(hub), "--save", str(save))
    assert f"--config {save / MODEL_FILE} --load {save} --finetune" in capsys.readouterr().out
    shutil.rmtree(hub)
    sections = yaml.safe_load((save / MODEL_FILE).read_text())
    assert sections["data"] == {
        "seq_length": 24,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(save / "tokenizer" / "tokenizer.json"),
    }
    tokenizer = load_trained_model(str(save), device="cpu").load_tokenizer()
    assert (tokenizer.eod, tokenizer.bos, tokenizer.encode("bad")) == (1, 0, [3, 2, 5])
    run(monkeypatch, "--load", str(save), "--save", str(out), "--to", "hf")
    said = capsys.readouterr().out
    assert "with its tokenizer (tokenizer.json, tokenizer_config.json" in said and "a model of llama" in said
    for name, content in BESIDE.items():
        assert json.loads((out / name).read_text()) == content, name
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, [1, 5], 3)
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs("bad", add_special_tokens=False)["input_ids"] == [3, 2, 5] and theirs.eos_token_id == 1


def test_a_tokenizer_with_more_tokens_than_the_model(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = ("--from", "hf", str(model), "--save", str(tmp_path / "run"), "--tokenizer-model", "5000")
    with pytest.raises(UserError, match="has 5001 ids, the model knows 62"):
        run(monkeypatch, *words)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_with_from(model: Path, monkeypatch: Any) -> None:
    for words, message in (
        (("--save", "run", "--optimizer"), "--optimizer: published weights have no"),
        (("--save", "run.safetensors"), "--from makes a checkpoint, which is a directory"),
        (("--save", "run", "--dtype", "bfloat16"), "it is for --to hf, rwkv7 and megatron"),
        (("--save", "run", "--max-shard-size", "1GB"), "it is for --to hf"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, "--from", "hf", str(model), *words)
    with pytest.raises(UserError, match="--max-shard-size few: expected a size such as 5GB"):
        run(monkeypatch, "--load", "x.safetensors", "--save", "out", "--to", "hf", "--max-shard-size", "few")


def test_load_names_the_command(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"convert_checkpoint.py --from hf {model} --save NEW_DIRECTORY"):
        find_checkpoint(model, ParallelContext.single())
    (tmp_path / "RWKV.pth").write_bytes(b"")
    with pytest.raises(UserError, match="convert_checkpoint.py --from rwkv7 .*RWKV.pth --save"):
        find_checkpoint(tmp_path / "RWKV.pth", ParallelContext.single())
