"""Words of a run: their level, and the file that keeps them."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megaforge.config.launcher import print_rank_0
from megaforge.config.run_config import LoggingConfig
from megaforge.errors import UserError
from megaforge.monitor.log import logged

CONFIG = LoggingConfig()
logger = logging.getLogger("megaforge.somewhere")


def test_the_file_has_everything_and_the_console_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "run.log"
    for _ in range(2):
        with logged(replace(CONFIG, log_file=str(file)), 0):
            print_rank_0("a note")
            logger.warning("beware")
            logger.debug("detail")
    lines = file.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO rank 0 a note", "WARNING rank 0 beware"] * 2
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in lines)
    assert capsys.readouterr().err == "a note\nWARNING: beware\n" * 2
    assert logging.getLogger("megaforge").handlers == [] and logging.getLogger("megaforge").level == logging.NOTSET


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(tmp_path: Path, level: str, count: int) -> None:
    file = tmp_path / "run.log"
    with logged(replace(CONFIG, log_file=str(file), log_level=level), 0):
        for say in (logger.debug, logger.info, logger.warning, logger.error):
            say("x")
    assert len(file.read_text().splitlines()) == count


def test_every_rank_has_a_file_where_its_name_says_so(tmp_path: Path) -> None:
    for rank in range(2):
        with logged(replace(CONFIG, log_file=str(tmp_path / "one.log")), rank):
            logger.info("x")
        with logged(replace(CONFIG, log_file=str(tmp_path / "rank-{rank}.log")), rank):
            logger.info("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.log", "rank-0.log", "rank-1.log"]
    assert len((tmp_path / "one.log").read_text().splitlines()) == 1


def test_what_ended_the_run_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.log"
    for error in (UserError("--lr 9: too much"), RuntimeError("broken"), SystemExit(0)):
        with pytest.raises(type(error)), logged(replace(CONFIG, log_file=str(file)), 0):
            raise error
    text = file.read_text()
    assert "ERROR rank 0 --lr 9: too much\n" in text and "RuntimeError: broken" in text and "Traceback" in text
    assert "SystemExit" not in text and capsys.readouterr().err == "", "the entry script shows it"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "file" / "x.log"):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(UserError, match="--log-file .* cannot be written"),
            logged(replace(CONFIG, log_file=str(path)), 0),
        ):
            pass
    assert logging.getLogger("megaforge").handlers == []
