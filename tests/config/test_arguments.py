"""A tool's parser: every complaint is one error that names the flag and its value."""

from __future__ import annotations

import pytest

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.errors import UserError


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_argument("--save")
    made.add_argument("--steps", type=integer(1))
    made.add_argument("--input", nargs="+")
    made.add_argument("--quiet", action="store_true")
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save", ""], "--save '': the value is empty"),
        (["--save="], "--save '': the value is empty"),
        (["--input", "a", ""], "--input '': the value is empty"),
        (["--save", "caf\udce9"], "--save caf\\udce9: holds bytes that are not UTF-8"),
        (["--input", "a", "\udcff"], "--input \\udcff: holds bytes that are not UTF-8"),
        (["--steps=--"], "--steps --: expected a value"),
        (["--save=--"], "--save --: expected a value"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--quiet=yes"], "--quiet: ignored explicit argument 'yes'"),
        (["--save"], "--save: expected one argument"),
        (["--sav", "x"], "unrecognized arguments: --sav x"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as found:
        parser().parse_args(words)
    assert str(found.value).startswith(message)


def test_help_cuts_no_flag_at_its_hyphens(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in range(60, 120, 7):
        monkeypatch.setenv("COLUMNS", str(columns))
        made = ArgumentParser(prog="tool")
        made.add_argument("--steps", help="how many; " + "as --train-iters or --lr-decay-iters say, " * 4)
        lines = made.format_help().splitlines()
        assert not [line for line in lines if line.endswith("-")] and max(map(len, lines)) <= columns


def test_any_letter_that_is_utf8_passes() -> None:
    assert parser().parse_args(["--save", "é 漢 🙂"]).save == "é 漢 🙂"
