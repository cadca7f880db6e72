#!/usr/bin/env python3
"""The Power of Ten (Holzmann, 2006), adapted to Python, C++ and CUDA: measured on this program's code, and on a run.

    python tools/compliance_report.py                                    the code alone
    python tools/compliance_report.py runs/mine                          the code and a run, by its --save directory
    python tools/compliance_report.py --code DIR                         code of your own
    python tools/compliance_report.py runs/mine --level standard --enforce

prints a line for each rule, gate and control, the score, the level that it reaches, and what the level asked for lacks.
Of a run it writes compliance.json and compliance.html into its directory (--output DIR: there, and of code too). The
status is 0 whatever is found; with --enforce it is 1 where the level or the score is not reached. ruff and mypy, which
rule 10 asks, take about a minute when they have not seen the code before. It is no certificate.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, number
from megaforge.config.entry import run_entry
from megaforge.errors import UserError


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's --save directory")
    parser.add_argument("--code", metavar="DIR", help="measure the code below it in place of this program's")
    parser.add_argument("--level", choices=("basic", "standard", "enhanced"), default="enhanced", help="asked for")
    parser.add_argument("--min-score", type=number(0, 1), default=0.95, metavar="X", help="asked for")
    parser.add_argument("--output", metavar="DIR", help="where the report is written (default: RUN)")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--enforce", action="store_true", help="end with status 1 where it does not pass")
    return parser


def main() -> int:
    """Measures, prints and writes."""
    flags = make_parser().parse_args()
    if flags.run is not None and not Path(flags.run).is_dir():
        raise UserError(f"{flags.run}: no such directory; name what a run was given as --save")
    import json

    from megaforge.compliance.code import OWN, read_code
    from megaforge.compliance.report import measure_code, measure_run

    report = measure_code(read_code(OWN if flags.code is None else Path(flags.code)))
    if flags.run is not None:
        report = measure_run(flags.run, report)
    if flags.json:
        print(json.dumps(report.as_json(flags.level, flags.min_score), indent=1))
    else:
        print("\n".join(report.lines(flags.level, flags.min_score)))
    output = flags.output or flags.run
    if output is not None:
        for path in report.write(Path(output), flags.level, flags.min_score):
            print(f"{path}: written", file=sys.stderr)
    return int(flags.enforce and not report.passes(flags.level, flags.min_score))


if __name__ == "__main__":
    run_entry(main)
