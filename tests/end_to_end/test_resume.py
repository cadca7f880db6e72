"""Killed runs go on as if nothing had happened, and a checkpoint continues at another layout."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.end_to_end.launch import records, run, run_and_kill_a_rank

SCRIPT = "pretrain_cdrmix.py"


class Layouts:
    """Uninterrupted runs, one a layout, made when first asked for."""

    def __init__(self, folder: Path, flags: tuple[str, ...]) -> None:
        self.folder, self.flags = folder, flags

    def finished(self, tp: int) -> Path:
        """Folder of the finished run at ``tp`` ranks: metrics.jsonl and checkpoints."""
        home = self.folder / f"tp{tp}"
        if not home.exists():
            files = ("--save", str(home / "checkpoints"), "--metrics-file", str(home / "metrics.jsonl"))
            outcome = run(tp, SCRIPT, *self.flags, *files, "--tp", str(tp))
            assert outcome.status == 0, outcome.err
        return home


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory, flags: tuple[str, ...]) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("runs"), flags)


@pytest.mark.parametrize(("tp", "number"), [(1, signal.SIGKILL), (2, signal.SIGUSR1)])
def test_a_killed_run_resumes_bit_for_bit(
    layouts: Layouts, flags: tuple[str, ...], tmp_path: Path, tp: int, number: int
) -> None:
    """SIGUSR1 is heard by one rank of two; both save after the same step and leave with status 0."""
    expected = records(layouts.finished(tp) / "metrics.jsonl")
    step = random.randint(4, 7)
    metrics, save = tmp_path / "metrics.jsonl", str(tmp_path / "checkpoints")
    arguments = (*flags, "--tp", str(tp), "--save", save, "--load", save, "--metrics-file", str(metrics))
    status = run_and_kill_a_rank(tp, SCRIPT, *arguments, metrics=metrics, step=step, number=number)
    assert (status == 0) == (number == signal.SIGUSR1)
    outcome = run(tp, SCRIPT, *arguments)  # the same line: it started the run, and continues it
    assert outcome.status == 0, outcome.err
    assert "continuing after iteration" in outcome.out
    assert records(metrics) == expected, f"killed after step {step}"
    outcome = run(1, SCRIPT, *arguments)
    assert outcome.status == 0 and "nothing is left to do" in outcome.err, outcome.err


def test_torchrun_restarts_a_run_that_lost_a_rank(layouts: Layouts, flags: tuple[str, ...], tmp_path: Path) -> None:
    """One restart is enough: the ranks that it starts do not read what the killed ones left in torchrun's store."""
    step = random.randint(4, 7)
    metrics, save = tmp_path / "metrics.jsonl", str(tmp_path / "checkpoints")
    arguments = (*flags, "--tp", "2", "--save", save, "--load", save, "--metrics-file", str(metrics))
    status = run_and_kill_a_rank(2, SCRIPT, *arguments, metrics=metrics, step=step, restarts=1)
    assert status == 0
    assert records(metrics) == records(layouts.finished(2) / "metrics.jsonl"), f"killed after step {step}"


def test_another_layout_continues_the_same_curve(layouts: Layouts, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Saved by two tensor-parallel ranks, continued by two data-parallel ones."""
    home = layouts.finished(2)
    metrics = tmp_path / "metrics.jsonl"
    files = ("--load", str(home / "checkpoints" / "step_0000003"), "--save", str(tmp_path / "moved"))
    outcome = run(2, SCRIPT, *flags, "--tp", "1", *files, "--metrics-file", str(metrics))
    assert outcome.status == 0, outcome.err
    expected = [r for r in records(home / "metrics.jsonl") if r["iteration"] > 3]
    found = records(metrics)
    assert [(r["kind"], r["iteration"]) for r in found] == [(r["kind"], r["iteration"]) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4), (name, theirs["iteration"])


def test_layouts_agree_from_the_first_step(layouts: Layouts) -> None:
    one, two = (records(layouts.finished(tp) / "metrics.jsonl") for tp in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), a["iteration"]


def test_evaluate_prints_the_same_at_any_layout_beside_the_bigram_model(layouts: Layouts, corpus: Path) -> None:
    import json

    prefix = str(corpus / "text_text_document")
    load = ("--load", str(layouts.finished(2) / "checkpoints"), "--input", prefix, "--json", "--device", "cpu")
    alone = run(1, "tools/evaluate.py", *load, "--baseline", "bigram", "--train-data", prefix)
    assert alone.status == 0, alone.err
    result = json.loads(alone.out)
    assert result["iteration"] == 10 and result["documents"] == 2
    assert 0 < result["bigram"]["bits_per_byte"] < result["ours"]["bits_per_byte"] < 8, "ten steps teach little"
    both = run(2, "tools/evaluate.py", *load)
    assert both.status == 0, both.err
    assert json.loads(both.out)["ours"]["loss"] == pytest.approx(result["ours"]["loss"], rel=1e-5)
    text = corpus / "note.txt"
    text.write_text("def main():\n    return 0\n", encoding="utf-8")
    short = run(1, "tools/evaluate.py", "--load", load[1], "--input", str(text), "--json", "--device", "cpu")
    assert json.loads(short.out)["text_bytes"] == len(text.read_bytes()), short.err
