"""Which flags an evaluation's input has a use for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.errors import UserError
from tools import evaluate


@pytest.mark.parametrize(
    ("name", "flag", "fits"),
    [
        ("t.txt", ("--part", "valid"), False),
        ("ds", ("--part", "valid"), True),
        ("ds", ("--tokenizer-model", "x"), False),
        ("t.txt", ("--tokenizer-model", "x"), True),
        ("ds", ("--json-key", "body"), False),
        ("t.txt", ("--json-key", "body"), True),
    ],
)
def test_flags_that_the_input_has_no_use_for(tmp_path: Path, name: str, flag: tuple[str, str], fits: bool) -> None:
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    (tmp_path / "ds.idx").touch()
    flags = evaluate.parse_arguments(["--load", "r", "--input", str(tmp_path / name), *flag])
    if fits:
        evaluate.check_input(flags)
    else:
        with pytest.raises(UserError, match=f"{' '.join(flag)}: --input .*{name} is"):
            evaluate.check_input(flags)
