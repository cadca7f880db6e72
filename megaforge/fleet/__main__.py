"""``python -m megaforge.fleet``: the same as ``tools/train_fleet.py``."""

from __future__ import annotations

from megaforge.config.entry import run_entry
from megaforge.fleet.command import main

if __name__ == "__main__":
    run_entry(main)
