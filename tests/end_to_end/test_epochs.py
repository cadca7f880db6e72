"""A run whose length, warm-up and intervals are in epochs, through the real script, on two ranks and on one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.launch import records, run

SAME_IN_EPOCHS = ("--train-iters", "--eval-interval", "--save-interval")


def test_a_run_in_epochs(flags: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    metrics, save = tmp_path / "m.jsonl", str(tmp_path / "run")
    behind = {place for place, word in enumerate(flags) if word in SAME_IN_EPOCHS}
    line = [word for place, word in enumerate(flags) if place not in behind and place - 1 not in behind]
    line += ["--train-epochs", "0.02", "--lr-warmup-epochs", "0.004", "--eval-interval-epochs", "0.01"]
    line += ["--save-interval-epochs", "0.01", "--save", save, "--load", save, "--metrics-file", str(metrics)]
    first = run(2, "pretrain_cdrmix.py", *line, "--zero", "1", "--exit-interval-epochs", "0.01")
    assert first.status == 0, first.err
    second = run(1, "pretrain_cdrmix.py", *line)
    assert second.status == 0, second.err
    [told] = [part for part in second.err.splitlines() if part.startswith("an epoch is")]
    epoch = int(told.split()[3].replace(",", ""))
    half, end = (-(-epoch * hundredths // (100 * 4 * 32)) for hundredths in (1, 2))
    found = records(metrics)
    assert [one["iteration"] for one in found if one["kind"] == "step"] == [*range(1, end + 1)]
    assert [one["iteration"] for one in found if one["kind"] == "evaluation"] == [half, end]
    assert {path.name for path in Path(save).glob("step_*")} == {f"step_{half:07}", f"step_{end:07}"}
    assert f"--train-epochs 0.02 is {end} iterations; --lr-warmup-epochs 0.004 is {-(-epoch // 32000)}" in second.err
    rates = [one["lr"] for one in found if one["kind"] == "step"]
    assert rates.index(max(rates)) + 1 == -(-epoch // 32000), "the warm-up ends there"
    manifest = json.loads((Path(save) / f"step_{end:07}" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["meta"]["config"]["training"]["train_iters"] == end

    refused = run(1, "pretrain_cdrmix.py", *flags, "--train-epochs", "2")
    assert refused.status == 2 and "--train-iters 10 and --train-epochs 2 exclude each other" in refused.err
