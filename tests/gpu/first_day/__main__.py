"""``python3 -m tests.gpu.first_day``: what gpu_first_day.sh starts, with any Python, for the build comes first."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.first_day.runner import Figure, Outcome, Step, pattern, report, run_step, run_steps, write
from tests.gpu.first_day.steps import steps

ROOT = Path(__file__).resolve().parents[3]
BUILD = 'source run_scripts/environment.sh; use_environment data,train,test,bench; echo "python: $PYTHON"'


def gpu() -> str | None:
    """Name, driver and memory of the first GPU; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def build_step() -> Step:
    """The environment and the native code, as every script of run_scripts makes them."""
    built = pattern(r"CUDA operators: (built|not built)")
    found = [Figure("CUDA operators", "built", built, equal="built")]
    return Step("build", ["bash", "-c", "set -e; " + BUILD], 600, found, shows=True)


def about(device: str) -> list[str]:
    """The machine and the code."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return [
        f"GPU, driver, memory: {device}",
        f"commit {commit.stdout.strip() or 'unknown'}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "expected figures are those of an H100; an H200 is 1.4 times as fast where memory bounds",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the report is written, whatever it says."""
    parser = argparse.ArgumentParser(prog="gpu_first_day.sh", description="Measures MegaForge on its first GPU.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu_first_day.md", help="the report")
    parser.add_argument("--minutes", type=float, default=30, help="for everything together (default: 30)")
    args = parser.parse_args(argv)
    device = gpu()
    if device is None:
        print("gpu_first_day: this machine has no GPU that nvidia-smi sees; nothing measured", file=sys.stderr)
        return 1
    os.chdir(ROOT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    facts, output = about(device), args.output.absolute()
    first = run_step(build_step(), min(600, 60 * args.minutes), environment)
    python = pattern(r"^python: (.*)$")(first.output) or sys.executable

    def save(outcomes: Sequence[Outcome]) -> None:
        write(output, report([first, *outcomes], facts))

    with tempfile.TemporaryDirectory(prefix="megaforge-first-day-") as folder:
        run_steps(steps(python, Path(folder)), 60 * args.minutes - first.seconds, environment, save)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
