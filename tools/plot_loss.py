#!/usr/bin/env python3
"""Draws the loss of one or more runs: python tools/plot_loss.py --metrics-file run.jsonl --output loss.png"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, number
from megaforge.config.entry import run_entry
from megaforge.errors import UserError, require
from megaforge.monitor.sinks import read_metrics


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--metrics-file", nargs="+", required=True, metavar="FILE", help="what --metrics-file wrote")
    parser.add_argument("--output", required=True, metavar="FILE", help="image to write: .png, .svg or .pdf")
    parser.add_argument(
        "--smooth", type=number(0, below=1), default=0.9, help="weight of the past in the mean line; 0: none"
    )
    return parser.parse_args(arguments)


def curve(records: list[dict[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    """(iterations, losses) of one kind of record, without those that are not finite."""
    chosen = [r for r in records if r.get("kind") == kind and r.get("loss") is not None]
    return [r["iteration"] for r in chosen], [r["loss"] for r in chosen]


def running_mean(values: list[float], weight: float) -> list[float]:
    """Exponential mean, started at the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else weight * out[-1] + (1 - weight) * value)
    return out


def draw(files: list[str], output: str, smooth: float) -> None:
    """Writes the image.

    Raises:
        UserError: a file holds no step, matplotlib is missing, or the image cannot be written.
    """
    require("matplotlib", extra="train", purpose="tools/plot_loss.py").use("Agg")
    pyplot = require("matplotlib.pyplot", extra="train", purpose="tools/plot_loss.py")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for index, name in enumerate(files):
        records = read_metrics(name)
        iterations, losses = curve(records, "step")
        if not losses:
            raise UserError(f"metrics file {name}: holds no training step")
        label = Path(name).stem if len(files) > 1 else "loss"
        color = f"C{index}"
        axes.plot(iterations, losses, color=color, alpha=0.25 if smooth else 1.0, linewidth=1)
        axes.plot(iterations, running_mean(losses, smooth), color=color, label=label)
        evaluated = curve(records, "evaluation")
        if evaluated[0]:
            style = {"color": color, "markersize": 4, "markeredgecolor": "black"}
            axes.plot(*evaluated, "o--", label=f"{label}: validation", **style)
    axes.set(xlabel="iteration", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error
    print(f"wrote {output}")


def main() -> int:
    flags = parse_arguments()
    draw(flags.metrics_file, flags.output, flags.smooth)
    return 0


if __name__ == "__main__":
    run_entry(main)
