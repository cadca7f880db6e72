"""Directories of models: what is missing or damaged is named, and what is written is written whole."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.hf_folder import HFFolder, publish_directory
from megaforge.checkpoint.safetensors_file import Slot, write_safetensors
from megaforge.config.arguments import byte_size
from megaforge.errors import UserError
from tests.disk_log import disk_log


def write(file: Path, name: str) -> None:
    write_safetensors(file, [Slot(name, torch.float32, (2,))], [torch.tensor([1.0, 2.0])])


def test_files_are_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / "model-1.safetensors", "a")
    write(tmp_path / "consolidated.safetensors", "b")
    assert HFFolder(tmp_path).slots.keys() == {"a", "b"}
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert HFFolder(tmp_path).slots.keys() == {"a"} and HFFolder(tmp_path).tensor("a").tolist() == [1, 2]
    index["weight_map"] |= {f"{i}": f"model-{i}.safetensors" for i in range(2, 4)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"files that are missing: model-2.safetensors, model-3.safetensors"):
        HFFolder(tmp_path)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json cannot be read"):
        HFFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights in it"):
        HFFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pytorch_model.bin is pickled, which is not read"):
        HFFolder(tmp_path)
    write(tmp_path / "model.safetensors", "a")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="model.safetensors: 7 bytes of data where the header lists 8"):
        HFFolder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=str(tmp_path)):
        HFFolder(tmp_path)


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        publish_directory(target, fail)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    assert publish_directory(target, lambda folder: (folder / "a").write_text("x")) == 1
    assert [path.name for path in target.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="not an empty directory"):
        publish_directory(target, fail)


def test_the_disk_has_its_files_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> None:
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text("x")

    done, there = disk_log(tmp_path, monkeypatch), ".model.tmp"
    publish_directory(tmp_path / "model", write)
    files = {("fsync", name) for name in (there, f"{there}/a", f"{there}/below", f"{there}/below/b")}
    assert set(done[:4]) == files and done[4:] == [("replace", there, "model"), ("fsync", ".")]
    assert sorted(path.name for path in (tmp_path / "model").rglob("*")) == ["a", "b", "below"]


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "1.5k": 1500, "77": 77}
    assert {text: byte_size(text) for text in sizes} == sizes
    for text in ("0", "5 apples", "", "GB"):
        with pytest.raises(ArgumentTypeError, match="expected a size"):
            byte_size(text)
