"""The command: ``python -m tests.sweep [COMMAND ...] [--cases N] [--seed S]``; status 1 when there are findings."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads must not fork

from tests.sweep import __doc__ as description
from tests.sweep.commands import COMMANDS
from tests.sweep.sweep import build_world, sweep


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sweep", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="*", help=f"default: all: {', '.join(COMMANDS)}")
    parser.add_argument("--cases", type=int, default=20, help="of each command (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="last line: an object with each command's findings")
    flags = parser.parse_args()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder))
        for command in flags.commands or COMMANDS:
            texts = []
            for finding in sweep(command, world, flags.cases, flags.seed):
                texts.append(f"{command}: {finding}")
                print(texts[-1], flush=True)
            print(f"{command}: {flags.cases} cases, {len(texts)} findings", flush=True)
            found[command] = "\n".join(texts)
    if flags.json:
        print(json.dumps(found))
    return int(any(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
