#!/usr/bin/env python3
"""Where two runs part: python tools/compare_runs.py runs/a runs/b [--rtol 1e-4]

Compares the digests that runs with --digest-interval N wrote, step by step: the residual stream behind each block, the
gradients, the weights. Prints the first step and the first layer or parameter that differ. Ends with status 1 where
runs part, with 0 where they do not. By default every bit counts; runs at different layouts, or on different machines,
add up in other orders and need --rtol.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, number
from megaforge.config.entry import run_entry
from megaforge.monitor.compare_digests import first_difference, read_digests


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run's --save directory, or its --digest-file")
    parser.add_argument("--rtol", type=number(0), default=0.0, help="how far apart norms may be, as a share")
    flags = parser.parse_args()
    one, other = (read_digests(run) for run in flags.runs)
    parting = first_difference(one, other, flags.rtol)
    common = sorted(one.keys() & other.keys())
    if parting is None:
        how = f"within {flags.rtol:g}" if flags.rtol else "to the bit"
        print(f"equal {how} in {len(common)} steps, {common[0]} to {common[-1]}")
        return 0
    before = [iteration for iteration in common if iteration < parting.iteration]
    print(
        f"iteration {parting.iteration}: {parting.part} of {parting.name} differ"
        + (f" (norms by {parting.relative:.3g})" if parting.relative else " (in bits; their norms are equal)")
        + f", and {parting.others} more of the {parting.part}"
    )
    print(f"the last equal iteration on record is {before[-1]}" if before else "no iteration on record is equal")
    return 1


if __name__ == "__main__":
    run_entry(main)
