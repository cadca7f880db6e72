#!/usr/bin/env python3
"""How much faster three models are in parallel than in series on this machine, beside source 002's table:
python examples/fleet/speedup.py --output runs/speedup

Both modes are run by turns with one thread a model, so that both do the same work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.errors import UserError
from megaforge.planning.table import table

REPO = Path(__file__).resolve().parents[2]
MODELS = 3
CLAIMED = (("4 CPUs, 8 GB", 1, 1.0), ("8 CPUs, 16 GB", 2, 1.7), ("16 CPUs, 32 GB", 4, 2.5), ("32 CPUs, 64 GB", 8, 3.8))


def bound(workers: int) -> float:
    """The most that so many workers can gain on models of one length: they need ceil(models / workers) rounds."""
    return MODELS / math.ceil(MODELS / workers)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="where the fleets go; it must not be there yet")
    parser.add_argument("--config", default=str(REPO / "examples/fleet/fleet.yaml"), help="a fleet of three models")
    parser.add_argument("--workers", type=integer(1, MODELS), nargs="+", default=[2, 3], help="models at once")
    parser.add_argument("--repeats", type=integer(1, 100), default=2, help="of each")
    flags = parser.parse_args(arguments)
    if Path(flags.output).exists():
        raise UserError(f"--output {flags.output}: it is there already; name a new directory")
    return flags


def seconds_of(flags: argparse.Namespace, workers: int, repeat: int) -> float:
    """Wall time of the whole fleet."""
    output = Path(flags.output) / f"workers{workers}_{repeat}"
    line = [sys.executable, str(REPO / "tools/train_fleet.py"), "--config", flags.config, "--output", str(output)]
    line += ["--mode", "series" if workers == 1 else "parallel", "--workers", str(workers), "--threads", "1"]
    line += ["--cpus-per-worker", "0.1", "--memory-per-worker-gb", "0.5", "--min-free-memory-gb", "0"]
    if subprocess.run([*line, "--high-load", "1"], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{output}: the fleet did not become complete; see its messages above")
    return float(json.loads((output / "fleet.json").read_text(encoding="utf-8"))["seconds"])


def main() -> int:
    """Runs all and prints the table."""
    flags = parse_arguments()
    counts = [1, *flags.workers]
    times: dict[int, list[float]] = {workers: [] for workers in counts}
    for repeat in range(flags.repeats):
        for workers in counts:
            times[workers].append(seconds_of(flags, workers, repeat))
    rows = [("machine", "workers", "speed-up", "at most")]
    cpus = len(os.sched_getaffinity(0))
    for workers in counts:
        gains = [one / other for one, other in zip(times[1], times[workers], strict=True)]
        spread = f"{statistics.median(gains):.2f} [{min(gains):.2f}, {max(gains):.2f}]"
        rows.append((f"this one, {cpus} CPUs", str(workers), spread, f"{min(cpus, bound(workers)):.2f}"))
    rows += [
        (
            f"002: {name}",
            str(workers),
            f"{claimed:.1f}" + " (cannot be)" * (claimed > bound(workers)),
            f"{bound(workers):.2f}",
        )
        for name, workers, claimed in CLAIMED
    ]
    print(table(rows))
    print(f"{MODELS} models of one length: 2 workers need two rounds, and more than {MODELS} workers are idle.")
    return 0


if __name__ == "__main__":
    run_entry(main)
