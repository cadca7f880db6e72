#!/usr/bin/env python3
"""A page that shows many runs while they train.

    python tools/dashboard.py --runs runs
    python tools/dashboard.py --runs runs --control examples/fleet/fleet.yaml

It prints the address, which holds the token without which nothing is shown; MEGAFORGE_DASHBOARD_TOKEN sets one that
stays. From another machine: ssh -L 8765:127.0.0.1:8765 HOST. The page reads the files that runs write to --save and
--metrics-file, and changes nothing; with --control it starts and stops the fleets of those files.
docs/dashboard.md shows it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.entry import run_entry


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", required=True, type=Path, metavar="DIR", help="the folder below which runs have their --save"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=integer(0, 65535), default=8765, help="0: any free one")
    parser.add_argument(
        "--interval", type=number(0.05, 3600), default=1.0, metavar="SECONDS", help="between two looks at the files"
    )
    parser.add_argument("--depth", type=integer(0, 10), default=3, help="how many folders below DIR to look for runs")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="of a proxy under whose address the page is seen, such as https://runs.example.org; may be repeated",
    )
    parser.add_argument(
        "--control",
        nargs="+",
        default=[],
        type=Path,
        metavar="FLEET.yaml",
        help="fleets (tools/train_fleet.py) that the page may start, in DIR/NAME, and stop",
    )
    return parser


def main() -> int:
    flags = make_parser().parse_args()
    from megaforge.dashboard.serve import serve

    serve(
        flags.runs,
        flags.host,
        flags.port,
        seconds=flags.interval,
        depth=flags.depth,
        fleets=tuple(flags.control),
        origins=tuple(origin.rstrip("/") for origin in flags.allow_origin),
    )
    return 0


if __name__ == "__main__":
    run_entry(main)
