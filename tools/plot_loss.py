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
from megaforge.data.images import check_image, save_image
from megaforge.errors import UserError, require
from megaforge.monitor.sinks import read_metrics


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--metrics-file", nargs="+", required=True, metavar="FILE", help="what --metrics-file wrote")
    parser.add_argument("--name", nargs="+", metavar="TEXT", help="of each run in the legend (default: from its path)")
    parser.add_argument("--output", required=True, metavar="FILE", help="image to write: .png, .svg or .pdf")
    parser.add_argument(
        "--smooth", type=number(0, below=1), default=0.9, help="weight of the past in the mean line; 0: none"
    )
    parser.add_argument("--x-axis", choices=("iteration", "tokens"), default="iteration", help="what to draw against")
    flags = parser.parse_args(arguments)
    if flags.name and len(flags.name) != len(flags.metrics_file):
        raise UserError(
            f"--name {' '.join(flags.name)}: {len(flags.name)} for {len(flags.metrics_file)} runs; give one for each"
        )
    check_image(flags.output)
    return flags


def curve(records: list[dict[str, Any]], kind: str, axis: str = "iteration") -> tuple[list[float], list[float]]:
    """(places on ``axis``, losses) of one kind of record, without those that are not finite.

    An evaluation has the place of its iteration's step: its own ``tokens`` are those that it evaluated.
    """
    places = {r["iteration"]: r.get(axis) for r in records if r.get("kind") == "step"}
    chosen = [
        (places.get(r["iteration"]) if axis != "iteration" else r["iteration"], r["loss"])
        for r in records
        if r.get("kind") == kind and r.get("loss") is not None
    ]
    known = [(place, loss) for place, loss in chosen if place is not None]
    return [place for place, _ in known], [loss for _, loss in known]


def running_mean(values: list[float], weight: float) -> list[float]:
    """Exponential mean whose weights sum to 1 at every point, as Adam corrects its moments (Kingma and Ba, arXiv
    1412.6980): the first value has no more weight than its age gives it."""
    out: list[float] = []
    total = share = 0.0
    for value in values:
        total, share = weight * total + (1 - weight) * value, weight * share + (1 - weight)
        out.append(total / share)
    return out


def names_of(files: list[str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart: ``a/metrics.jsonl b/metrics.jsonl`` are a and b."""
    if len(files) == 1:
        return ["loss"]
    parts = [Path(file).absolute().with_suffix("").parts for file in files]
    if len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]  # all have one file name: their directories are their names
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return files  # a file that was given twice


def label_of(name: str) -> str:
    """``name`` as matplotlib draws it to the letter: no mathematics between dollars, no bytes that are not UTF-8."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def draw(files: list[str], names: list[str], output: str, smooth: float, axis: str = "iteration") -> None:
    """Writes the image.

    Raises:
        UserError: a file holds no step, matplotlib is missing, or the image cannot be written.
    """
    require("matplotlib", extra="train", purpose="tools/plot_loss.py").use("Agg")
    pyplot = require("matplotlib.pyplot", extra="train", purpose="tools/plot_loss.py")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    lines, labels = [], []
    for index, (file, name) in enumerate(zip(files, names, strict=True)):
        records, name = read_metrics(file), label_of(name)
        places, losses = curve(records, "step", axis)
        if not losses:
            raise UserError(f"metrics file {file}: holds no training step")
        color = f"C{index}"
        axes.plot(places, losses, color=color, alpha=0.25 if smooth else 1.0, linewidth=1)
        lines += axes.plot(places, running_mean(losses, smooth), color=color)
        labels.append(name)
        evaluated = curve(records, "evaluation", axis)
        if evaluated[0]:
            style = {"color": color, "markersize": 4, "markeredgecolor": "black"}
            lines += axes.plot(*evaluated, "o--", **style)
            labels.append(f"{name}: validation")
    axes.set(xlabel=axis, ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    # A label that begins with _ would be left out, but not the text of one that stands.
    for text, label in zip(axes.legend(lines, ["?"] * len(lines)).get_texts(), labels, strict=True):
        text.set_text(label)
    figure.tight_layout()
    save_image(figure, output)
    pyplot.close(figure)
    print(f"wrote {output}")


def main() -> int:
    flags = parse_arguments()
    names = flags.name or names_of(flags.metrics_file)
    draw(flags.metrics_file, names, flags.output, flags.smooth, flags.x_axis)
    return 0


if __name__ == "__main__":
    run_entry(main)
