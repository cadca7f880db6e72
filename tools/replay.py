#!/usr/bin/env python3
"""One step of a run made once more: python tools/replay.py runs/mine --step 1234

Goes on from the run's nearest checkpoint before the step, with the flags that it was made with, and prints the step's
loss and gradient norm; compares them with the run's metrics file, and with its digests (--digest-interval), to the bit.
Start it on as many ranks as the run had (torchrun --nproc-per-node 8 tools/replay.py ...), in the same directory.
Writes nothing. Ends with status 1 where the step comes out otherwise than then: on the same machine that is a broken
device or a program that is not deterministic.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's --save directory")
    parser.add_argument("--step", type=integer(1), required=True, help="the iteration to repeat")
    parser.add_argument(
        "--skipped",
        action="store_true",
        help="the step that was undone after a spike, or left out, as RUN/replay has it, not the one made in its place",
    )
    flags = parser.parse_args()
    from megaforge.parallel.distributed import shutdown
    from megaforge.verification.replay import replay

    status = replay(flags.run, flags.step, skipped=flags.skipped)
    shutdown()
    return status


if __name__ == "__main__":
    run_entry(main)
