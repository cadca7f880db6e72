#!/usr/bin/env python3
"""Trains moe-test as it is and with one part of it taken away at a time, on the same tokens, and prints what each costs
and gives: python examples/moe_5b/arms.py --data corpus/train --tokenizer corpus/tok.json --output runs/moe_5b

An arm that has been trained is not trained again. ``--small`` takes seconds: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.training_run import train_once
from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.errors import UserError
from megaforge.monitor.sinks import read_metrics

ARMS = {
    "all": (),
    "without grouped queries": ("--num-query-groups", "4"),
    "without routing (Mamba-2)": ("--hybrid-layer-pattern", "ME*EME*E", "--rom-num-experts", "none"),
    "without Mixture of Depths": ("--mod-capacity-factor", "none"),
    "without further tokens": ("--mtp-num-layers", "0"),
}
SMALL = (  # in which only what runs can be seen
    *("--hidden-size", "32", "--ffn-hidden-size", "32", "--num-experts", "4", "--mamba-head-dim", "16"),
    *("--mamba-state-dim", "8", "--seq-length", "32", "--train-iters", "2"),
    *("--eval-interval", "2", "--eval-iters", "1"),
    *("--log-interval", "1", "--lr-warmup-iters", "1", "--micro-batch-size", "2", "--global-batch-size", "2"),
    *("--split", "80,20,0"),
)


@dataclass(frozen=True)
class Arm:
    """What a run gave.

    Attributes:
        loss: cross-entropy of the next token in the validation part at the end, in nats.
        bits: the same in bits per byte.
        tokens_per_second: median over the steps.
        memory: peak resident bytes.
        busiest: tokens of the busiest expert over the mean, at the end.
    """

    loss: float
    bits: float
    tokens_per_second: float
    memory: int
    busiest: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PREFIX", help="the dataset to train on")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="its tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", help="where metrics go")
    parser.add_argument("--train-tokens", metavar="N", help="of each arm (default: the preset's million)")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes")
    return parser.parse_args(arguments)


def train(flags: argparse.Namespace, name: str) -> Arm:
    """Trains an arm unless it has been."""
    metrics = Path(flags.output).absolute() / f"{name.split(' (')[0].replace(' ', '-')}.jsonl"
    line = [
        *("pretrain_cdrmix.py", "--config", "moe-test", "--device", "cpu", *(SMALL if flags.small else ())),
        *(() if flags.train_tokens is None else ("--train-tokens", flags.train_tokens)),
        *(*ARMS[name], "--data-path", flags.data, "--tokenizer-model", flags.tokenizer, "--num-workers", "0"),
    ]
    train_once(line, metrics)
    return read(metrics)


def read(metrics: Path) -> Arm:
    """What a run wrote."""
    records = read_metrics(metrics)
    steps = [record for record in records if record["kind"] == "step"]
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    return Arm(
        last["loss"],
        last["bits_per_byte"],
        statistics.median(record["tokens_per_second"] for record in steps),
        max(int(record.get("peak_memory_bytes", 0)) for record in steps),
        steps[-1]["expert_max_load"],
    )


def table(found: dict[str, Arm]) -> str:
    """A row an arm, beside the first."""
    rows = [f"{'arm':28} {'loss':>7} {'bits/byte':>10} {'tokens/s':>9} {'of all':>7} {'memory':>8} {'busiest':>8}"]
    whole = next(iter(found.values()))
    for name, arm in found.items():
        rows.append(
            f"{name:28} {arm.loss:7.4f} {arm.bits:10.4f} {arm.tokens_per_second:9,.0f} "
            f"{arm.tokens_per_second / whole.tokens_per_second:7.2f} {arm.memory / 1e9:5.2f} GB {arm.busiest:7.2f}x"
        )
    return "\n".join(rows)


def main() -> int:
    flags = parse_arguments()
    if flags.small and flags.train_tokens is not None:
        raise UserError("--train-tokens: --small has its own length; leave one of the two away")
    print(table({name: train(flags, name) for name in flags.arms}))
    return 0


if __name__ == "__main__":
    run_entry(main)
