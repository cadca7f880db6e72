"""Datasets from files and apart for each part: one form of naming them at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.config.cli import ParsedConfig, format_config, parse_config
from megaforge.errors import UserError


def parse(*argv: str) -> ParsedConfig:
    return parse_config(argv)


def test_words_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("0.7 a\n0.3  b\n")
    found = parse("--data-args-path", str(file))
    assert found.config.data.data_path == ("0.7", "a", "0.3", "b") and found.config.data.data_args_path is None
    assert found.origins["data.data_path"] == f"--data-args-path {file}"
    again = tmp_path / "again.yaml"
    again.write_text(format_config(found))
    assert parse("--config", str(again)).config.data == found.config.data


def test_parts_apart(tmp_path: Path) -> None:
    valid = ("--valid-data-path", "v", "w", "--eval-iters", "1")
    data = parse("--train-data-path", "2", "a", "1", "b", *valid).config.data
    assert (data.data_path, data.valid_data_path, data.test_data_path) == (("2", "a", "1", "b"), ("v", "w"), ())
    assert (data.split, data.train_data_path) == ("1,0,0", ())
    file = tmp_path / "parts.json"
    file.write_text(json.dumps({"train": "2 a 1 b", "valid": ["v", "w"], "test": None}))
    found = parse("--per-split-data-args-path", str(file), "--eval-iters", "1")
    assert found.config.data == data and found.origins["data.split"] == "--train-data-path"
    other = tmp_path / "base.yaml"
    other.write_text("data:\n  data_path: [x]\n  split: 9,1,0\n")
    assert parse("--config", str(other), "--train-data-path", "2", "a", "1", "b", *valid).config.data == data


@pytest.mark.parametrize(
    ("argv", "text", "complaint"),
    [
        (("--data-path", "a", "--train-data-path", "b"), "", "--data-path and --train-data-path exclude each other"),
        (("--train-data-path", "b", "--split", "9,1,0"), "", "all of that is for training; leave out --split"),
        (("--data-args-path", "FILE"), " \n", "FILE: is empty"),
        (("--data-args-path", "FILE.none"), "", "FILE.none: cannot be read .No such file"),
        (("--per-split-data-args-path", "FILE"), "{", "FILE: is not JSON"),
        (("--per-split-data-args-path", "FILE"), "[]", "FILE: it names nothing to train on"),
        (("--per-split-data-args-path", "FILE"), '{"valid": ["a"]}', "FILE: it names nothing to train on"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, argv: tuple[str, ...], text: str, complaint: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint.replace("FILE", str(file))):
        parse(*(word.replace("FILE", str(file)) for word in argv))


def test_synthetic_data_are_mock_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse("--data-path", "synthetic")
    assert found.config == parse("--mock-data").config
    assert found.origins["data.mock_data"] == "command line --data-path synthetic"
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  data_path: [synthetic]\n")
    assert parse("--config", str(file)).config.data.mock_data
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic.idx").touch()
    assert parse("--data-path", "./synthetic").config.data.data_path == ("./synthetic",)
    with pytest.raises(UserError, match=r"there is a dataset synthetic.idx: write ./synthetic"):
        parse("--data-path", "synthetic")
