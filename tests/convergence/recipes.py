"""The recipes, their text, and how curves are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.tasks.example import Room, make_example

CURVES = Path(__file__).with_name("curves.json")
EVERY = 20  # steps whose mean loss is a point of a curve
BAND = 0.03  # share by which a point may be off; sums in another order move one by less than a thousandth

_MODEL = ("--hidden-size", "64", "--num-attention-heads", "4", "--ffn-hidden-size", "128", "--rwkv-head-size", "16")
_MAMBA = ("--mamba-head-dim", "16", "--mamba-state-dim", "16", "--mamba-num-groups", "2")
_EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2")
RECIPES: dict[str, tuple[str, ...]] = {
    "attention": ("--hybrid-layer-pattern", "*-*-", "--activation", "swiglu"),
    "rwkv7": ("--hybrid-layer-pattern", "R-R-"),
    "mamba2": ("--hybrid-layer-pattern", "M-M-", *_MAMBA),
    "experts": ("--hybrid-layer-pattern", "RE*E", *_EXPERTS),
    "routed mamba": ("--hybrid-layer-pattern", "O-*-", *_MAMBA, *_EXPERTS),
    "bitnet": ("--hybrid-layer-pattern", "R-*-", "--quantize-weights", "ternary"),
    "further predictions": ("--hybrid-layer-pattern", "R-*-", "--mtp-num-layers", "1"),
    "depths": ("--hybrid-layer-pattern", "*-*-*-*-", "--mod-capacity-factor", "0.5"),
    "muon": ("--hybrid-layer-pattern", "R-*-", "--optimizer", "muon", "--lr", "5e-3"),
}


def write_text(prefix: Path, documents: int = 400) -> str:
    """Examples of three tasks as bytes: the same on every machine."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            name = ("recall", "copying", "modular_arithmetic")[number % 3]
            text = make_example(name, 0, number, Room(120, len)).text + "\n"
            writer.add_document(np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    return str(prefix)


def flags_of(name: str, prefix: str, metrics: Path) -> list[str]:
    """Of ``pretrain_cdrmix.py``."""
    return [
        *(*_MODEL, "--seq-length", "128", "--data-path", prefix, "--split", "90,10,0", "--num-workers", "0"),
        *("--tokenizer-type", "NullTokenizer", "--tokenizer-model", "255", "--device", "cpu", "--seed", "7"),
        *("--micro-batch-size", "8", "--global-batch-size", "8", "--train-iters", "120", "--lr", "3e-3"),
        *("--lr-warmup-iters", "10", "--eval-iters", "4", "--log-interval", "20", "--metrics-file", str(metrics)),
        *RECIPES[name],
    ]


def curve(lines: Sequence[str]) -> list[float]:
    """Mean losses of :data:`EVERY` steps each, then the loss of the evaluation at the end."""
    records = [json.loads(line) for line in lines]
    steps = [one["loss"] for one in records if one["kind"] == "step"]
    means = [math.fsum(steps[start : start + EVERY]) / EVERY for start in range(0, len(steps), EVERY)]
    return [*means, next(one["loss"] for one in records if one["kind"] == "evaluation")]


def departures(found: Sequence[float], kept: Sequence[float], band: float = BAND) -> list[str]:
    """What is outside of the band around a curve that was kept: better is as suspicious as worse."""
    if len(found) != len(kept):
        return [f"{len(found)} points, and {len(kept)} are kept"]
    return [
        f"point {number}: {one:.4f}, and {other:.4f} is kept ({one / other - 1:+.1%})"
        for number, (one, other) in enumerate(zip(found, kept, strict=True), 1)
        if not abs(one - other) <= band * other
    ]
