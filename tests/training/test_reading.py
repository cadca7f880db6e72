"""What a run reads is the same at every layout: lengths that change, weights that change, documents rearranged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.datasets import random_documents
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, flags, train
from tests.training.tiny import VOCAB, write_dataset

SCHEDULE = """
sources: {a: {domain: web}, b: {domain: code}}
domains: {web: 3, code: 1}
stretches: [{samples: 8, seq_length: 8}, {samples: 8, seq_length: 16, domains: {web: 1, code: 1}}, {}]
"""
CHANGED = (
    *("--fim-data", "--fim-domain-rates", "code:1", "web:0.3", "--span-mask-rate", "0.1", "--mask-token", "57"),
    *("--fim-prefix-token", "58", "--fim-middle-token", "59", "--fim-suffix-token", "60"),
)
STEPS = ("--train-iters", "5", "--micro-batch-size", "1", "--eval-iters", "0", "--eval-interval", "0", "--fp64")


def reading(folder: Path) -> tuple[str, ...]:
    paths = [write_dataset(folder / name, seed=seed) for seed, name in enumerate("ab")]
    (folder / "own.yaml").write_text(SCHEDULE)
    return ("--data-path", *paths, "--data-schedule", str(folder / "own.yaml"), *CHANGED)


def streamed(folder: Path) -> tuple[str, ...]:
    lines = (json.dumps({"text": " ".join(map(str, ids))}) for ids in random_documents(1, 90, 30, VOCAB - 1))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return ("--data-path", f"stream:{folder}/text.jsonl", "--stream-round", "8")


@pytest.mark.parametrize("of", [reading, streamed])
def test_one_run_whatever_the_layout(ranks: RankPool, tmp_path: Path, of: Callable[[Path], tuple[str, ...]]) -> None:
    """A run on one rank, and the same in two pieces: over tp 2, pp 2 with sp, then over dp 2, cp 2."""
    given = flags("unused", *STEPS, *of(tmp_path))
    expected, run = train(given), str(tmp_path / "run")
    first = ranks.run(4, train, [*given, "--tp", "2", "--sp", "--pp", "2", "--save", run, "--exit-interval", "3"])
    second = ranks.run(4, train, [*given, "--cp", "2", "--load", run], 0.0)
    for before, outcome in zip(first, second, strict=True):
        outcome["records"] = before["records"] + outcome["records"]
    compare(second, expected, 1e-9)
