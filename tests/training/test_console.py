"""What people see, on a terminal and in a file."""

from __future__ import annotations

import io
import math
import os
import pty
import re
from pathlib import Path

import pytest

from megaforge.config.run_config import LoggingConfig
from megaforge.monitor.log import logged
from megaforge.training.console import ConsoleLog, Interval, fitting, terminal_columns
from megaforge.training.metrics import StepMetrics
from tests.training.tiny import arguments, make_trainer, write_dataset


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def output(tmp_path: Path, stream: io.StringIO, *flags: str) -> str:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    trainer = make_trainer(arguments(prefix, "--eval-iters", "1", "--train-iters", "5", *flags))
    trainer.callbacks = [
        ConsoleLog(2, callback.speed, stream) if isinstance(callback, ConsoleLog) else callback
        for callback in trainer.callbacks
    ]
    trainer.train()
    return stream.getvalue()


def test_a_file_gets_a_line_an_interval_and_the_last(tmp_path: Path) -> None:
    text = output(tmp_path, io.StringIO())
    lines = [line for line in text.splitlines() if line.startswith("iteration")]
    heads = [line.split(" | ")[0] for line in lines]
    assert heads == ["iteration 2/5  40%", "iteration 4/5  80%", "iteration 5/5 100%"]
    for part in ("loss ", "grad norm ", "lr ", "ms a step", "tokens/s", "FLOP/s (", "% of peak)", "ETA 0:"):
        assert part in lines[0], part
    assert re.search(r"[MG]B memory, [\d,]+ page faults a step \| experts \d\.\d\d bits, busiest \d\.\dx", lines[0])
    assert re.search(r" \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", lines[0])
    assert "\r" not in text and "evaluation at iteration 5: loss " in text and "perplexity" in text


def test_a_run_that_has_nothing_to_do_says_why(tmp_path: Path) -> None:
    """It ended for another reason than --train-iters where a limit was over before its first step."""
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    texts = []
    for done, reason in ((5, None), (0, "--exit-duration-in-mins 0.05 is over")):
        trainer, stream = make_trainer(arguments(prefix, "--eval-iters", "1", "--train-iters", "5")), io.StringIO()
        trainer.iteration, trainer.stop_reason = done, reason
        (speed,) = [callback.speed for callback in trainer.callbacks if isinstance(callback, ConsoleLog)]
        ConsoleLog(1, speed, stream).on_train_start(trainer)
        texts.append(stream.getvalue())
    assert "nothing left to do: --train-iters 5 is reached" in texts[0]
    assert "nothing left" not in texts[1]


def test_a_terminal_also_gets_a_live_line(tmp_path: Path) -> None:
    text = output(tmp_path, Terminal())
    assert "\r\x1b[2K[#####..." in text, "iteration 1 of 5, in place"
    assert text.count("\n") == output(tmp_path, io.StringIO()).count("\n"), "in place means no further lines"


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_reduced_precision_runs_and_says_its_scale(tmp_path: Path, flag: str) -> None:
    text = output(tmp_path, io.StringIO(), flag)
    assert ("loss scale" in text) == (flag == "--fp16")


def test_a_terminal_gets_lines_that_fit_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = output(tmp_path, Terminal())
    lines = [line for line in re.split(r"\r\x1b\[2K|\n", text) if "iteration" in line and "evaluation" not in line]
    assert len(lines) >= 4 and max(map(len, lines)) < 80  # a live line only where the last one is old enough
    for part in ("loss ", "tokens/s", "ETA"):
        assert all(part in line for line in lines if not line.startswith("[")), part


def test_a_line_tells_of_its_whole_interval() -> None:
    interval = Interval()
    for iteration, loss in ((1, 4.0), (2, 2.0), (3, math.inf)):
        interval.add(StepMetrics(iteration, loss, 1.0, 1e-3, 0, 0, 100, seconds=0.5, extra={"clipped": iteration % 2}))
    assert interval.mean("loss") == 3.0, "without the step that overflowed"
    assert interval.mean("clipped") == pytest.approx(2 / 3)
    assert (interval.tokens, interval.seconds, interval.steps) == (300, 1.5, 3)
    assert math.isnan(interval.mean("absent"))


def test_the_least_important_parts_go_first() -> None:
    parts = [(0, "a" * 4), (2, "b" * 4), (1, "c" * 4)]
    assert fitting(parts, 18) == "aaaa | bbbb | cccc"
    assert fitting(parts, 17) == "aaaa | cccc"
    assert fitting(parts, 6) == "aaaa"
    assert fitting(parts, 3) == "aaa"
    assert fitting(parts, -2) == ""


def test_the_width_is_the_streams_own() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
        assert terminal_columns(stream) == 57
    os.close(leader)


def test_a_quiet_run_prints_no_line_for_its_iterations(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    with logged(LoggingConfig(log_level="warning", log_file=str(file)), 0):
        assert output(tmp_path, io.StringIO()) == ""
    assert file.read_text() == ""
    with logged(LoggingConfig(log_file=str(file)), 0):
        shown = output(tmp_path, io.StringIO()).splitlines()
    kept = [line.partition(" rank 0 ")[2] for line in file.read_text().splitlines()]
    assert shown and set(shown) <= set(kept), "the file has all that the console has"
