#!/usr/bin/env python3
"""A whole run made once more: python tools/reproduce.py runs/mine/receipt.json --save runs/again

Every run with --save leaves receipt.json when it ends: its configuration, the digests of code and data, its environment
and its results. This trains it again from the beginning, with the same configuration and data, into a new directory,
and says of each result whether it is the same to the bit: loss, gradient norm, evaluation, and every file of the last
checkpoint. Start it on as many ranks as the run had (torchrun --nproc-per-node 8 tools/reproduce.py ...), in the same
directory. --check only says what of code and environment is not as it was. Ends with status 1 where something differs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.errors import UserError


def main() -> int:
    """Trains and compares; 0 where all is the same."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("receipt", metavar="RECEIPT", type=Path, help="receipt.json, or a run's --save directory")
    parser.add_argument("--save", metavar="DIR", type=Path, help="where the run goes; must be new")
    parser.add_argument("--check", action="store_true", help="compare code and environment, and train nothing")
    flags = parser.parse_args()
    if flags.check == (flags.save is not None):
        raise UserError("give either --save DIR, a new directory for the run, or --check")
    if not flags.receipt.exists():
        raise UserError(f"{flags.receipt}: there is no such receipt; name RUN/receipt.json")
    from megaforge.parallel.distributed import shutdown
    from megaforge.verification.reproduce import differences_of_machine, read_receipt, reproduce

    receipt = read_receipt(flags.receipt)
    if flags.check:
        found = differences_of_machine(receipt)
        print("\n".join(f"not as then: {one}" for one in found) or "code and environment are as they were")
        return int(bool(found))
    status = reproduce(receipt, flags.save)
    shutdown()
    return status


if __name__ == "__main__":
    run_entry(main)
