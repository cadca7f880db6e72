"""``--profile`` writes a trace and a table of the steps that were asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.training.callbacks import Callback
from megaforge.training.profiling import Profile
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset


def profiled(tmp_path: Path, *flags: str) -> Trainer:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    given = ("--profile", "--profile-dir", str(tmp_path / "new" / "p"), "--train-iters", "4", *flags)
    trainer = make_trainer(arguments(prefix, *given))
    # Measuring the machine's speed takes time, and is not asked here.
    trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Profile)]
    return trainer


def test_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        profiled(tmp_path, "--profile-step-start", "1", "--profile-step-end", "3").train()
    stem = "rank0-iterations-2-3"
    names = sorted(path.name for path in (tmp_path / "new" / "p").iterdir())
    assert names == [f"{s}{end}" for s in (stem + "-2", stem) for end in (".pt.trace.json.gz", ".txt")]
    with gzip.open(tmp_path / "new" / "p" / f"{stem}.pt.trace.json.gz") as file:
        events = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    rows = 4 * 2  # micro-batches of each of the two steps
    assert events.count("aten::embedding") == rows
    assert "aten::mm" in (tmp_path / "new" / "p" / f"{stem}.txt").read_text()
    printed = capsys.readouterr().out
    assert "operator" in printed and "profile of iterations 2 to 3" in printed


def test_a_run_that_ends_inside_still_writes(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step_end(self, trainer: Trainer, metrics: object) -> None:
            trainer.stop("enough")

    trainer = profiled(tmp_path, "--profile-step-start", "0", "--profile-step-end", "3")
    trainer.callbacks.insert(0, Stop())
    trainer.train()
    assert (tmp_path / "new" / "p" / "rank0-iterations-1-1.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--profile-step-start", "4", "--profile-step-end", "5"), "--profile-step-start 4: the run ends after"),
        (("--profile-step-start", "1", "--profile-ranks", "0", "1"), "--profile-ranks 1: the run has ranks 0 to 0"),
    ],
)
def test_what_the_run_does_not_have_is_refused(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        profiled(tmp_path, *flags).train()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--profile-step-start", "5", "--profile-step-end", "5"), "--profile-step-end 5"),
        (("--profile-step-start", "-1"), "--profile-step-start -1"),
        (("--profile-ranks", "-1"), "--profile-ranks -1"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(["--profile", *flags])
