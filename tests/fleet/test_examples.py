"""The examples' commands, but for the training itself, which the integration tests have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.fleet import speedup, three_models
from megaforge.errors import UserError
from megaforge.fleet import CognateCreator


def test_three_models_by_source_002s_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[CognateCreator] = []

    def train(self: CognateCreator, directory: str) -> list[str]:
        asked.append(self)
        (tmp_path / "a.json").write_text(json.dumps({"loss": 1.5, "iteration": 40, "seconds": 9.0}))
        return [str(tmp_path / "a")]

    monkeypatch.setattr(CognateCreator, "create_three_models", train)
    monkeypatch.setattr(sys, "argv", ["three_models.py", "--output", str(tmp_path), "--mode", "parallel", "--small"])
    assert three_models.main() == 0
    assert asked[0].config.epochs == 4 and asked[0].config.training_mode == "parallel"
    out = capsys.readouterr().out
    assert "suggested: " in out and "workers: " in out and "a: loss 1.5000 after 40 steps in 9 s" in out


def test_speed_up_is_a_median_of_turns_beside_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [speedup.bound(workers) for workers in (1, 2, 3, 4, 8)] == [1.0, 1.5, 3.0, 3.0, 3.0]
    turns: list[int] = []

    class Done:
        returncode = 0

    def run(line: list[str], **options: object) -> Done:
        workers = int(line[line.index("--workers") + 1])
        assert line[line.index("--mode") + 1] == ("series" if workers == 1 else "parallel")
        turns.append(workers)
        output = Path(line[line.index("--output") + 1])
        output.mkdir(parents=True)
        (output / "fleet.json").write_text(json.dumps({"seconds": 12.0 / workers}))
        return Done()

    monkeypatch.setattr(speedup.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["speedup.py", "--output", str(tmp_path / "x")])
    assert speedup.main() == 0 and turns == [1, 2, 3, 1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("this one") and "2.00 [2.00, 2.00]" in line for line in lines)
    assert ["cannot be" in line for line in lines if line.startswith("002:")] == [False, True, False, True]
    with pytest.raises(UserError, match="it is there already"):
        speedup.main()
