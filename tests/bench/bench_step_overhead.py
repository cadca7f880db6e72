"""What an iteration does besides its train step: waiting for the batch, console, metrics and TensorBoard.

    bash run_scripts/bench.sh step_overhead [--iterations 30]

Trains cdrmix-tiny as the quickstart does (8 sequences of 256 tokens, on one rank) with ``--log-interval 1``,
``--metrics-file`` and ``--tensorboard-dir``. The share is time outside ``Trainer.train_step`` over the whole loop's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megaforge.config.cli import parse_config
from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.parallel.context import ParallelContext
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from megaforge.training.trainer import Trainer
from tests.bench.harness import print_json, print_table

VOCAB, WARMUP = 2048, 3


def build(directory: Path, iterations: int) -> Trainer:
    prefix = directory / "corpus"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(400):
            writer.add_document(rng.integers(0, VOCAB, 1000))
    flags = ("--config", "cdrmix-tiny", "--micro-batch-size", "8", "--data-path", str(prefix), "--device", "cpu")
    sinks = ("--metrics-file", str(directory / "m.jsonl"), "--tensorboard-dir", str(directory / "tensorboard"))
    length = ("--train-iters", str(WARMUP + iterations + 1), "--log-interval", "1", "--eval-iters", "0")
    tokenizer = ("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(VOCAB))
    return build_trainer(prepare(parse_config([*flags, *tokenizer, *sinks, *length]).config), ParallelContext.single())


def measure(trainer: Trainer) -> dict[str, list[float]]:
    """Seconds of each iteration after the warm-up and before the last: whole, in the step, in callbacks."""
    clock, times, began = time.perf_counter, {"whole": [], "step": [], "callbacks": []}, [0.0]
    step, emit = trainer.train_step, trainer._emit

    def timed_step(batches: Any) -> Any:
        start = clock()
        metrics = step(batches)
        times["step"].append(clock() - start)
        return metrics

    def timed_emit(event: str, *arguments: Any) -> None:
        start = clock()
        emit(event, *arguments)
        now = clock()
        if event == "on_step_end":
            times["callbacks"].append(now - start)
            times["whole"].append(now - began[0])
        if event in ("on_train_start", "on_step_end"):
            began[0] = now

    trainer.train_step, trainer._emit = timed_step, timed_emit  # type: ignore[method-assign]
    trainer.train()
    return {name: values[WARMUP:-1] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    iterations = parser.parse_args().iterations
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        times = measure(build(Path(directory), iterations))
    shares = [1 - inside / whole for inside, whole in zip(times["step"], times["whole"], strict=True)]
    outside = [whole - inside for inside, whole in zip(times["step"], times["whole"], strict=True)]
    median = statistics.median
    rows: list[list[object]] = [
        ["whole iteration", 1e3 * median(times["whole"])],
        ["outside the step", 1e3 * median(outside)],
        ["of that, callbacks", 1e3 * median(times["callbacks"])],
    ]
    print_table("Milliseconds of an iteration of cdrmix-tiny at --log-interval 1", ["part", "median"], rows)
    share = median(shares)
    print(f"outside the step: {share:.2%} ({min(shares):.2%} to {max(shares):.2%})")
    case = {"ratio": round(share, 5), "min": round(min(shares), 5), "max": round(max(shares), 5)}
    print_json("step_overhead", {"cdrmix-tiny": {**case, "peer": "the whole iteration"}})


if __name__ == "__main__":
    main()
