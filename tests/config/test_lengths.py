"""One length, several flags: which holds, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import ParsedConfig, format_config, parse_config
from megaforge.config.length_config import INTERVALS, LENGTHS, LengthConfig
from megaforge.config.schema import settings
from megaforge.errors import UserError


def test_each_flag_of_the_section_is_of_one_length() -> None:
    rows = {**LENGTHS, **INTERVALS}
    names = [name for row in rows.values() for name in row]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(LengthConfig))
    assert all(key in settings() for key in rows)


def file(folder: Path, text: str) -> list[str]:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def lengths(parsed: ParsedConfig) -> tuple[float | None, ...]:
    c = parsed.config
    return c.training.train_iters, c.length.train_epochs, c.length.train_samples


def test_what_is_nearer_to_the_run_holds(tmp_path: Path) -> None:
    preset = ["--config", "cdrmix-tiny"]
    assert lengths(parse_config([*preset, "--train-epochs", "2"])) == (100, 2.0, None), "the preset's 450 are off"
    written = file(tmp_path, "base: cdrmix-tiny\nlength: {train_epochs: 0.5, lr_warmup_epochs: 0.1}\n")
    assert lengths(parse_config(written)) == (100, 0.5, None)
    assert lengths(parse_config([*written, "--train-iters", "7"])) == (7, None, None)
    assert lengths(parse_config([*written, "--train-samples", "7"])) == (100, None, 7)
    parsed = parse_config([*written, "--lr-warmup-fraction", "0.1"])
    assert parsed.config.length.lr_warmup_epochs is None and parsed.config.optimizer.lr_warmup_iters == 0
    assert "--lr-warmup-fraction (command line" in parsed.origins["length.lr_warmup_epochs"]
    assert lengths(parse_config([*preset, "--train-epochs", "none"])) == (450, None, None)
    nearer = tmp_path / "nearer.yaml"
    nearer.write_text("base: mine.yaml\ntraining: {train_iters: 9}\nlength: {eval_interval_epochs: 1}\n")
    assert lengths(parse_config(["--config", str(nearer)]))[:2] == (9, None), "a file holds before its base"
    off = [*file(tmp_path, "length: {eval_interval_epochs: 2}\ntraining: {eval_iters: 1}\n"), "--eval-interval", "0"]
    assert parse_config(off).config.length.eval_interval_epochs is None


def test_the_printed_configuration_is_read_back(tmp_path: Path) -> None:
    parsed = parse_config(["--config", "cdrmix-tiny", "--train-epochs", "0.1", "--eval-interval-epochs", "0.05"])
    again = parse_config(file(tmp_path, format_config(parsed)))
    assert again.config == parsed.config


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--train-iters", "100", "--train-epochs", "2"), "--train-iters 100 and --train-epochs 2 exclude each other"),
        (("--train-epochs", "2.5", "--train-samples", "9"), "--train-epochs 2.5 and --train-samples 9 exclude"),
        (("--lr-warmup-epochs", "1", "--lr-warmup-fraction", "0.1"), "exclude each other; leave out one of them"),
        (("--eval-interval", "0", "--eval-interval-epochs", "1"), "--eval-interval 0 and --eval-interval-epochs 1"),
        (("--train-epochs", "0"), "--train-epochs 0: must be above 0 and at most 100000"),
        (("--train-epochs", "-1"), "--train-epochs -1: must be"),
        (("--train-epochs", "1e9"), "--train-epochs 1e9: must be above 0 and at most 100000"),
        (("--train-epochs", "nan"), "--train-epochs nan: expected a finite number"),
    ],
)
def test_refused(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(list(flags))
    assert complaint in str(caught.value)


def test_two_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--train-iters 9 and --train-epochs 2 exclude each other"):
        parse_config(file(tmp_path, "training: {train_iters: 9}\nlength: {train_epochs: 2}\n"))


def test_random_tokens_have_no_epoch() -> None:
    for flag in ("--train-epochs", "--save-interval-epochs"):
        config = parse_config(["--mock-data", "--save", "r", flag, "2"]).config
        with pytest.raises(UserError, match=f"{flag} 2: --mock-data has no end.*--train-samples"):
            check_layout(config, 1)
    check_layout(parse_config(["--mock-data", "--train-samples", "9"]).config, 1)


def test_a_schedule_is_checked_once_it_is_known() -> None:
    """Neither --lr-warmup-iters nor WSD's decay is compared with the default of --train-iters."""
    wsd = ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "500")
    line = ["--vocab-size", "64", "--train-epochs", "2", "--lr-warmup-iters", "500", *wsd]
    assert check_layout(parse_config(line).config, 1).notes == ()
