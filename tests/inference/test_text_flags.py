"""Tools that ask about texts refuse what they would not read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.inference.text_flags import add_text_flags, check_text_flags, read_input
from tests.inference.text_model import Bytes


def parsed(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_text_flags(parser)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--memory")
    return parser.parse_args(line)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (("--input", "x"), "nothing is asked"),
        (("--input", "x", "--question", "q", "--examples", "3"), "--examples 3: it is read with --task"),
        (("--input", "x", "--question", "q", "--seed", "0"), "--seed 0: it is read with --task"),
        (("--task", "kv_chunks", "--question", "q"), r"--question \['q'\]: it is read with --input"),
        (("--task", "kv_chunks", "--memory", "m"), "--memory m: it is read with --input"),
    ],
)
def test_a_flag_that_would_not_be_read_is_refused(line: tuple[str, ...], text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_text_flags(parsed(*line), of_task=("seed",), of_input=("memory",))


def test_what_is_read_passes() -> None:
    check_text_flags(parsed("--task", "kv_chunks", "--chunks", "3", "--seed", "0"), ("seed",), ("memory",))
    check_text_flags(parsed("--input", "x", "--question", "q", "--memory", "m"), ("seed",), ("memory",))


def test_a_text_is_read_with_its_tokens(tmp_path: Path) -> None:
    file, empty, binary = (tmp_path / name for name in ("text", "empty", "binary"))
    file.write_text("ab", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    assert read_input(str(file), Bytes()) == ("ab", (97, 98))
    for path, text in ((empty, "it is empty"), (binary, "cannot be read as text"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=text):
            read_input(str(path), Bytes())
