"""A step made once more gives the bits that the run wrote, or says that it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.training.spike_rollback import SpikeRollback
from megaforge.verification import replay
from tests.training.tiny import arguments, make_trainer, record, write_dataset


def again(run: Path, step: int, skipped: bool = False) -> int:
    return replay.replay(run, step, skipped=skipped, context=lambda config: ParallelContext.single())


def test_steps_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, save, metrics = write_dataset(tmp_path / "train_text_document"), tmp_path / "run", tmp_path / "m.jsonl"
    line = arguments(prefix, "--save", str(save), "--save-interval", "2", "--keep-last", "0", "--train-iters", "7")
    line += ["--metrics-file", str(metrics), "--digest-interval", "1", "--spike-rollback", "2", "--eval-iters", "1"]
    line += ["--eval-interval", "2", "--exit-interval", "5"]
    trainer = make_trainer(line)
    undone = []

    def once(self: SpikeRollback, step: object) -> str | None:
        if getattr(step, "iteration", 0) != 4 or undone:
            return None
        undone.append(step)
        return "loss spikes to 9"

    monkeypatch.setattr(SpikeRollback, "_reason", once)
    recorder = record(trainer)
    trainer.train()
    rows = [row for row in recorder.records if row["kind"] == "step"]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 3, 4, 5]
    files = sorted(path.name for path in save.iterdir())
    capsys.readouterr()
    for step, start in ((1, "the beginning"), (3, "step_0000002"), (5, "step_0000004")):
        assert again(save, step) == 0
        told = capsys.readouterr().out
        [row] = [row for row in rows if row["iteration"] == step][-1:]
        assert f"iteration {step}, from {start}" in told and repr(row["loss"]) in told
        assert f"{metrics}: the same to the bit" in told and "weights: equal" in told
    assert again(save, 4, skipped=True) == 0
    assert repr(undone[0].loss) in capsys.readouterr().out, "with the batch that it had then"
    assert sorted(path.name for path in save.iterdir()) == files
    changed = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*changed, json.dumps(rows[-1] | {"loss": 1.5})]) + "\n")
    assert again(save, 5) == 1 and "loss was 1.5 then" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such step was left out"):
        again(save, 5, skipped=True)
    with pytest.raises(UserError, match="holds no checkpoint of a run"):
        again(tmp_path / "nowhere", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="was written by 1 rank, and 2 were started"):
        again(save, 5)
