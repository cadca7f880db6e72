"""What people see, on a terminal and in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megaforge.training.console import ConsoleLog
from tests.training.tiny import arguments, make_trainer, write_dataset


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def output(tmp_path: Path, stream: io.StringIO, *flags: str) -> str:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    trainer = make_trainer(arguments(prefix, "--eval-iters", "1", "--train-iters", "5", *flags))
    trainer.callbacks = [
        ConsoleLog(2, stream) if isinstance(callback, ConsoleLog) else callback for callback in trainer.callbacks
    ]
    trainer.train()
    return stream.getvalue()


def test_a_file_gets_a_line_an_interval_and_the_last(tmp_path: Path) -> None:
    text = output(tmp_path, io.StringIO())
    lines = [line for line in text.splitlines() if line.startswith("iteration")]
    heads = [line.split(" | ")[0] for line in lines]
    assert heads == ["iteration 2/5  40%", "iteration 4/5  80%", "iteration 5/5 100%"]
    for part in ("loss ", "grad norm ", "lr ", "tokens/s", "FLOP/s (", "% of peak)", "ETA 0:"):
        assert part in lines[0], part
    assert "\r" not in text and "evaluation at iteration 5: loss " in text and "perplexity" in text


def test_a_terminal_also_gets_a_live_line(tmp_path: Path) -> None:
    text = output(tmp_path, Terminal())
    assert "\r\x1b[2K[#####..." in text, "iteration 1 of 5, in place"
    assert text.count("\n") == output(tmp_path, io.StringIO()).count("\n"), "in place means no further lines"


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_reduced_precision_runs_and_says_its_scale(tmp_path: Path, flag: str) -> None:
    text = output(tmp_path, io.StringIO(), flag)
    assert ("loss scale" in text) == (flag == "--fp16")
