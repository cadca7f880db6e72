"""How long a script takes to say something before the first step, beside Python that imports nothing.

    bash run_scripts/bench.sh start [--rounds 10]

Wall time of the whole process. The targets: help, printed configurations and wrong flags within 0.25 s, a missing
dataset within 0.4 s. The peer's time shows how fast the machine starts Python at all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.harness import interleaved_ratio, print_json, print_table, seconds

REPO = Path(__file__).resolve().parents[2]
CASES = {
    "--help": ("pretrain_cdrmix.py", "--help"),
    "--print-config": ("pretrain_cdrmix.py", "--config", "cdrmix-tiny", "--print-config"),
    "a wrong flag": ("pretrain_cdrmix.py", "--learning-rate", "1"),
    "a missing dataset": ("pretrain_cdrmix.py", "--config", "cdrmix-tiny", "--data-path", "nowhere/data"),
    "generate.py --help": ("tools/generate.py", "--help"),
    "preprocess_data.py, a wrong flag": ("tools/preprocess_data.py", "--workers", "none"),
    "plan.py memory, a wrong GPU": ("tools/plan.py", "memory", "--gpu", "abacus"),
}


def start(command: Sequence[str]) -> None:
    subprocess.run([sys.executable, *command], cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    cases, rows = {}, []
    for name, command in CASES.items():
        ratio = interleaved_ratio(
            seconds(lambda command=command: start(command)), seconds(lambda: start(("-c", "pass"))), rounds
        )
        cases[name] = ratio.case("python -c pass", seconds=round(ratio.candidate, 4))
        rows.append([name, ratio.candidate, ratio.peer, ratio.median])
    print_table("Seconds from the command to the end", ["case", "seconds", "python -c pass", "ratio"], rows)
    print_json("start", cases)


if __name__ == "__main__":
    main()
