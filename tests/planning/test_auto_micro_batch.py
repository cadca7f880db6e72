"""``--micro-batch-size auto``: chosen by memory, by all ranks alike, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.config.cli import format_config, parse_config
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.planning.auto_micro_batch import AutoMicroBatch, choose_micro_batch
from megaforge.planning.gpus import gpu_named
from megaforge.planning.plan_command import run
from megaforge.training.callbacks import MetricsWriter
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from tests.training.tiny import Recorder, arguments, make_trainer, write_dataset

SMALL = ("--config", "cdrmix-test", "--vocab-size", "500", "--global-batch-size", "8", "--micro-batch-size", "auto")


def test_the_choice_stays_within_memory_and_divides_the_batch() -> None:
    gpu, needed = gpu_named("h100-80g"), []
    for limit in ("1.0", "0.03"):
        config = parse_config([*SMALL, "--seq-length", "2048", "--memory-limit", limit]).config
        size, why = choose_micro_batch(config, 1, gpu)
        needed.append((size, why.partition(" that have room")[0]))
    assert needed[0] == (8, "--micro-batch-size auto: 8, of 1, 2, 4, 8")
    assert needed[1][0] < 8, "three hundredths of 80 GB do not hold eight sequences"
    staged = parse_config([*SMALL, "--pp", "2"]).config
    assert choose_micro_batch(staged, 2, gpu)[0] == 1, "two stages are busy with many small micro-batches"
    on_three = parse_config([*SMALL, "--global-batch-size", "6"]).config
    assert choose_micro_batch(on_three, 3, gpu)[0] == 2, "a rank has two sequences of six"
    with pytest.raises(UserError, match="--micro-batch-size auto: the fullest of 1 x h100-80g needs .*full"):
        choose_micro_batch(parse_config([*SMALL, "--memory-limit", "0.001"]).config, 1, gpu)
    with pytest.raises(UserError, match="--global-batch-size 8 is not divisible"):
        choose_micro_batch(config, 3, gpu)


def test_a_dry_run_plans_for_a_machine() -> None:
    parsed = parse_config([*SMALL, "--machine", "h100-80g"])
    chosen, notes = AutoMicroBatch(parsed.origins).planned(parsed.config, 2)
    assert chosen.training.micro_batch_size == 4 and "2 x h100-80g" in notes[0]
    assert chosen.parallel == parsed.config.parallel and chosen.training.global_batch_size == 8
    with pytest.raises(UserError, match="--micro-batch-size auto: a dry run's ranks .* add --machine"):
        AutoMicroBatch().planned(parse_config(SMALL).config, 2)


def test_it_is_a_word_on_the_line_and_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "auto.yaml"
    file.write_text("base: cdrmix-test\ntraining:\n  micro_batch_size: auto\n  global_batch_size: 8\n")
    shown = format_config(parse_config(["--config", str(file)]))
    assert "micro_batch_size: auto " in shown
    for word in ("0", "automatic"):
        with pytest.raises(UserError, match=f"--micro-batch-size {word}: "):
            parse_config(["--micro-batch-size", word])
    run([*SMALL, "--gpu", "h100-80g"])
    out = capsys.readouterr().out
    assert out.startswith("--micro-batch-size auto: 8") and "--micro-batch-size 8 (dp 1)" in out


def test_what_is_learned_stays_the_same(tmp_path: Path) -> None:
    argv = arguments(write_dataset(tmp_path / "d_text_document", documents=20), "--fp64", "--train-iters", "2")
    plain = make_trainer([*argv, "--micro-batch-size", "1"])
    parsed = parse_config([*argv, "--micro-batch-size", "auto"])
    prepared = prepare(parsed.config, choose=AutoMicroBatch(parsed.origins))
    chosen = build_trainer(prepared, ParallelContext.single())
    assert chosen.config.training.micro_batch_size > 1 and chosen.batches.size == plain.batches.size
    found = []
    for trainer in (plain, chosen):
        recorder = Recorder()
        trainer.callbacks.append(MetricsWriter([recorder]))
        trainer.train()
        found.append([(r["loss"], r["grad_norm"]) for r in recorder.records])
    assert len(found[0]) == 2
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
