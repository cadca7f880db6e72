"""A run whose length, warm-up and intervals are in epochs, by the real script, at ``--layout auto`` of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.launch import records, run

SAME_IN_EPOCHS = ("--train-iters", "--eval-interval", "--save-interval")


def test_a_run_in_epochs(flags: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    metrics, save = tmp_path / "m.jsonl", str(tmp_path / "run")
    behind = {place for place, word in enumerate(flags) if word in SAME_IN_EPOCHS}
    line = [word for place, word in enumerate(flags) if place not in behind and place - 1 not in behind]
    line += ["--train-epochs", "0.006", "--lr-warmup-epochs", "0.002", "--eval-interval-epochs", "0.003"]
    line += ["--save-interval-epochs", "0.003", "--save", save, "--metrics-file", str(metrics)]
    outcome = run(2, "pretrain_cdrmix.py", *line, "--layout", "auto", "--pp", "1", "--zero", "1")
    assert outcome.status == 0, outcome.err
    [chosen] = [part for part in outcome.err.splitlines() if part.startswith("--layout auto: --tp ")]
    assert " --zero 1 " in chosen and "with --pipeline-model-parallel-size, --zero-stage" in chosen
    [told] = [part for part in outcome.err.splitlines() if part.startswith("an epoch is")]
    epoch = int(told.split()[3].replace(",", ""))
    warm, half, end = (-(-epoch * thousandths // (1000 * 4 * 32)) for thousandths in (2, 3, 6))
    found = records(metrics)
    assert [one["iteration"] for one in found if one["kind"] == "step"] == [*range(1, end + 1)]
    assert [one["iteration"] for one in found if one["kind"] == "evaluation"] == [half, end]
    assert {path.name for path in Path(save).glob("step_*")} == {f"step_{half:07}", f"step_{end:07}"}
    assert f"--train-epochs 0.006 is {end} iterations; --lr-warmup-epochs 0.002 is {warm}" in outcome.err
    rates = [one["lr"] for one in found if one["kind"] == "step"]
    assert rates.index(max(rates)) + 1 == warm < half < end, "the warm-up ends there"
    manifest = json.loads((Path(save) / f"step_{end:07}" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["meta"]["config"]["training"]["train_iters"] == end

    refused = run(1, "pretrain_cdrmix.py", *flags, "--train-epochs", "2")
    assert refused.status == 2 and "--train-iters 10 and --train-epochs 2 exclude each other" in refused.err
