#!/usr/bin/env python3
"""Trains several models: python tools/train_fleet.py --config fleet.yaml --output runs/fleet"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.entry import run_entry


def main() -> int:
    from megaforge.fleet.command import main as run

    return run()


if __name__ == "__main__":
    run_entry(main, "interrupted: the models were ended; the same command goes on from their checkpoints")
