#!/usr/bin/env python3
"""Trains the arms of the grokking example one after the other, prints when each generalises, and draws their curves:

python examples/grokking/arms.py --output runs/grokking --seeds 0 1 2

An arm that has been trained is not trained again. ``--check`` fails where a filter has not generalised in time, or what
is unfiltered has. ``--small`` takes seconds: a small prime and model, too few steps to see anything generalise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.training_run import train_once
from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.data.images import check_image, save_image
from megaforge.errors import UserError, require
from megaforge.monitor.sinks import read_metrics

ARMS = {
    "none": (),
    "none-0.01": ("--weight-decay", "0.01"),
    "ema": ("--grokfast", "ema"),
    "ma": ("--grokfast", "ma", "--weight-decay", "0.01"),
    "adamw": ("--decoupled-weight-decay", "--weight-decay", "1"),
}
LABELS = {
    "none": "Adam, no filter",
    "none-0.01": "Adam, L2 of 0.01, no filter",
    "ema": "Adam, --grokfast ema",
    "ma": "Adam, L2 of 0.01, --grokfast ma",
    "adamw": "AdamW, weight decay 1, no filter",
}
SMALL = (  # in which only what runs can be seen
    *("--data-path", "modular://23", "--vocab-size", "25", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--micro-batch-size", "64", "--global-batch-size", "64", "--train-iters", "40", "--eval-iters", "4"),
    *("--eval-interval", "20", "--grokfast-window", "10"),
)
GOAL = 0.95
MEMORISED = 0.1  # what has not begun to generalise is below
FILTERED = {"ema": "none", "ma": "none-0.01"}  # and the same optimizer unfiltered


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="where metrics go, and curves.png")
    parser.add_argument("--picture", metavar="FILE", help="image to write (default: curves.png in --output)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights, split and order of the data")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes")
    parser.add_argument("--check", action="store_true", help="fail unless the filters, and they alone, generalise")
    flags = parser.parse_args(arguments)
    if flags.check and flags.small:
        raise UserError("--check: nothing generalises with --small; leave one of the two away")
    return flags


def line_of(arm: str, seed: int, small: bool) -> list[str]:
    """The command that trains an arm."""
    more = [*SMALL] if small else []
    if small and arm != "ma":  # the window is a flag of one filter
        more = more[:-2]
    return [
        *("pretrain_cdrmix.py", "--config", "examples/grokking/modular.yaml", "--seed", str(seed)),
        *(*ARMS[arm], *more),
    ]


def accuracies(metrics: Path) -> dict[int, float]:
    """Validation accuracy by iteration."""
    return {r["iteration"]: r["accuracy"] for r in read_metrics(metrics) if r["kind"] == "evaluation"}


def train(flags: argparse.Namespace) -> dict[tuple[str, int], dict[int, float]]:
    """Trains what is missing; the accuracies of each arm and seed."""
    found = {}
    output = Path(flags.output).absolute()
    for seed in flags.seeds:
        for arm in flags.arms:
            metrics = output / f"{arm}.{seed}.jsonl"
            train_once(line_of(arm, seed, flags.small), metrics)
            found[arm, seed] = accuracies(metrics)
    return found


def table(found: dict[tuple[str, int], dict[int, float]]) -> str:
    """A row an arm and seed: when it first had the accuracy that counts, and what it had at the end."""
    rows = [f"{'arm':34} seed  {GOAL:.0%} at  at the end"]
    for (arm, seed), curve in found.items():
        reached = next((str(step) for step, accuracy in curve.items() if accuracy >= GOAL), "-")
        rows.append(f"{LABELS[arm]:34} {seed:4} {reached:>7} {list(curve.values())[-1]:11.1%}")
    return "\n".join(rows)


def failures(found: dict[tuple[str, int], dict[int, float]]) -> list[str]:
    """What the curves contradict: both filters generalise, and the same optimizer without does not."""
    faults = []
    for (arm, seed), curve in found.items():
        most, last = max(curve.values()), list(curve.values())[-1]
        if arm in FILTERED and most < GOAL:
            faults.append(f"{LABELS[arm]}, seed {seed}: {most:.1%} of the held-out equations, below {GOAL:.0%}")
        if arm in FILTERED.values() and last >= MEMORISED:
            faults.append(
                f"{LABELS[arm]}, seed {seed}: {last:.1%} of the held-out equations, not below {MEMORISED:.0%}"
            )
    return faults


def draw(found: dict[tuple[str, int], dict[int, float]], picture: str) -> None:
    """Validation accuracy of every arm; its seeds have one colour."""
    require("matplotlib", extra="train", purpose="examples/grokking/arms.py").use("Agg")
    pyplot: Any = require("matplotlib.pyplot", extra="train", purpose="examples/grokking/arms.py")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    seen: set[str] = set()
    for (arm, _), curve in found.items():
        label = None if arm in seen else LABELS[arm]
        axes.plot(
            list(curve), [100 * a for a in curve.values()], f"C{list(ARMS).index(arm)}", label=label, linewidth=1.2
        )
        seen.add(arm)
    axes.set(xlabel="iteration", ylabel="validation accuracy in %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    save_image(figure, picture, "--picture")
    pyplot.close(figure)
    print(f"wrote {picture}")


def main() -> int:
    flags = parse_arguments()
    picture = flags.picture or str(Path(flags.output) / "curves.png")
    check_image(picture, "--picture")
    found = train(flags)
    print(table(found))
    draw(found, picture)
    faults = failures(found) if flags.check else []
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    run_entry(main)
