"""A tiny run in this process: what the trainer's own tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.monitor.names import MEASURED
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import MetricsWriter
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from megaforge.training.trainer import Trainer

VOCAB = 61
EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2")


def write_dataset(prefix: Path, *, documents: int = 40, vocab: int = VOCAB, seed: int = 0) -> str:
    """Documents of a drifting counter with noise: learnable, and no two alike."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(rng.integers(5, 90))
            writer.add_document(((np.arange(length) + rng.integers(0, vocab)) * 3 + rng.integers(0, 2, length)) % vocab)
    return str(prefix)


def arguments(prefix: str, *more: str) -> list[str]:
    """Flags of a model that trains in milliseconds; ``more`` come last and win."""
    return [
        *("--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48", "--rwkv-head-size", "8"),
        *("--hybrid-layer-pattern", "RE*E", *EXPERTS),
        *("--data-path", prefix, "--split", "80,20,0", "--seq-length", "24", "--device", "cpu", "--num-workers", "0"),
        *("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(VOCAB), "--log-interval", "1"),
        *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "6", "--lr", "1e-3"),
        *("--alerts-off", "throughput", "memory", "disk"),  # which depend on the machine
        *("--lr-decay-style", "constant"),  # runs of other lengths continue each other
        *more,
    ]


def dense_arguments(prefix: str, pattern: str, *more: str) -> list[str]:
    """:func:`arguments` of a model without experts."""
    given = arguments(prefix)
    start = given.index(EXPERTS[0])
    return [*given[:start], *given[start + len(EXPERTS) :], "--hybrid-layer-pattern", pattern, *more]


def make_config(argv: list[str]) -> Config:
    return parse_config(argv, prog="test").config


def make_trainer(argv: list[str], ctx: ParallelContext | None = None) -> Trainer:
    """A trainer as the entry script builds it, without touching process-wide settings."""
    return build_trainer(prepare(make_config(argv)), ctx or ParallelContext.single())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, _, tensor in trainer.optimizer.weight_entries()}


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        timeless = {k: v for k, v in values.items() if k not in MEASURED}
        self.records.append({"kind": kind, "iteration": iteration, **timeless})

    def flush(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


def record(trainer: Trainer) -> Recorder:
    """Adds a recorder to the run's sinks."""
    recorder = Recorder()
    [writer] = [callback for callback in trainer.callbacks if isinstance(callback, MetricsWriter)]
    writer.sinks.append(recorder)
    return recorder


def goes_on_alike(argv: list[str], folder: Path) -> list[dict[str, Any]]:
    """Trains as ``argv`` says, and again with an end behind step 2 and the rest from its checkpoint in ``folder``: the
    same records and weights, bit for bit. Returns the records."""
    whole = make_trainer(argv)
    told = record(whole)
    whole.train()
    saving = [*argv, "--save", str(folder), "--save-interval", "1", "--load", str(folder)]
    first = make_trainer([*saving, "--exit-interval", "2"])
    first.train()
    assert first.iteration == 2
    second = make_trainer(saving)
    rest = record(second)
    second.train()
    assert rest.records == told.records[2:]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name
    return told.records
