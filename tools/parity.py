#!/usr/bin/env python3
"""Shows that the layout changes nothing but speed: trains a small model at many layouts and on one rank, and compares.

    python tools/parity.py                                          # all layouts of up to 8 ranks, on this CPU
    python tools/parity.py --layouts tp2-pp2-dp2,ep4 --dtype fp32
    python tools/parity.py --max-ranks 2 --config cdrmix-test [any model flag]
    torchrun --nproc-per-node 8 tools/parity.py --device cuda --dtype fp32

The text is random documents and, in fp64, documents of runs of one token, whose keys and experts are alike (in fp32
some gradients of those are nothing but rounding).
Each line is a layout: the largest relative difference over five optimizer steps of the loss, of every gradient, of the
gradient norm, of the routers' statistics, and of the weights at the end; all within 1e-10 (fp64) or 2e-5 (fp32), or the
status is 1.

--layouts names lines of the table (default: all that the ranks suffice for and the model fits into), --dtype
is fp64 or fp32. Without a launcher the ranks are started here, at most --max-ranks.
"""

from __future__ import annotations

import os
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.entry import run_entry


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return 0
    from megaforge.verification.parity_options import parse_options

    _ = parse_options(sys.argv[1:])  # a mistake is found before torch is imported
    from megaforge.verification import parity_command

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return parity_command.run(sys.argv[1:], os.path.abspath(__file__))


if __name__ == "__main__":
    run_entry(main)
