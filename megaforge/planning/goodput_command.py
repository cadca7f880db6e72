"""``tools/plan.py goodput``: how often to save, and what share of the time failures cost at each scale."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.monitor.accounting import Accounting
from megaforge.monitor.events import EVENTS_FILE, read_events
from megaforge.planning.goodput import HOLDS, Tier, least_mtbf, lost, two_tiers
from megaforge.planning.table import table

SCALES = (8, 32, 64, 256, 1024, 4096, 16384)


def make_parser(prog: str) -> ArgumentParser:
    """The command's flags."""
    parser = ArgumentParser(
        prog=prog, description="Prints the best intervals between saves and the share of time that failures cost."
    )
    parser.add_argument("--gpus", type=integer(1, 1 << 20), default=1024, help="GPUs of the run")
    parser.add_argument(
        "--mtbf-hours", type=number(above=0), default=7.9, metavar="H",
        help="mean time between failures that end the job (7.9 hours at 1,024 GPUs: Kokolis et al., HPCA 2025)",
    )  # fmt: skip
    parser.add_argument("--mtbf-gpus", type=integer(1, 1 << 20), help="GPUs that --mtbf-hours is of; default: --gpus")
    parser.add_argument(
        "--stall", type=number(0), default=1.0, metavar="S", help="seconds that a durable checkpoint stops training"
    )
    parser.add_argument(
        "--restart", type=number(0), default=300.0, metavar="S",
        help="seconds from a failure to the first new step, from a durable checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--save-seconds", type=number(0), default=0.0, metavar="S",
        help="seconds until a durable checkpoint is written while training goes on, as none begins before",
    )  # fmt: skip
    parser.add_argument(
        "--snapshot-stall", type=number(0), default=0.1, metavar="S", help="seconds that a snapshot stops training"
    )
    parser.add_argument(
        "--snapshot-restart", type=number(0), default=60.0, metavar="S", help="--restart from a snapshot"
    )
    parser.add_argument(
        "--snapshot-seconds", type=number(0), default=0.0, metavar="S", help="--save-seconds of a snapshot"
    )
    parser.add_argument(
        "--snapshot-share", type=number(0, 1), default=0.9, metavar="X", help="share of failures that snapshots survive"
    )
    parser.add_argument(
        "--goal", type=number(above=0, below=1), default=0.01, metavar="X", help="share of time that may be lost"
    )
    parser.add_argument(
        "--run", metavar="DIR", help="print instead what the time of the run with --save DIR has gone into"
    )
    parser.add_argument(
        "--step-seconds", type=number(above=0), metavar="S", help="of a step: also print intervals in steps"
    )
    return parser


def run(arguments: Sequence[str], prog: str = "plan.py goodput") -> None:
    """Prints the table."""
    args = make_parser(prog).parse_args(arguments)
    print(report(args) if args.run is None else of_run(args.run))


def of_run(directory: str) -> str:
    """What the time of the run below ``directory`` has gone into, by its events.

    Raises:
        UserError: it has none, or they cannot be read.
    """
    found = read_events(Path(directory) / EVENTS_FILE)
    goodput = Accounting(found.events).goodput()
    rows: list[tuple[str, ...]] = [("went into", "seconds", "share")]
    parts = sorted(goodput.spent.items(), key=lambda part: -part[1])
    rows += [(name, f"{seconds:,.1f}", f"{seconds / goodput.total:.2%}") for name, seconds in parts]
    rows.append(("all", f"{goodput.total:,.1f}", "100.00%" if goodput.total else "-"))
    times = Counter(event["kind"] for event in found.events)
    kinds = ", ".join(f"{kind} {count}" for kind, count in times.most_common())
    lines = [goodput.lines()[0], f"iteration {goodput.steps:,}", "", table(rows), "", f"events: {kinds}"]
    if found.torn is not None:
        lines.append(f"the last line is not whole and does not count: {found.torn!r}")
    return "\n".join(lines)


def report(args: argparse.Namespace) -> str:
    """The best intervals and what is lost at several scales, and up to which the goal holds."""
    of_gpus = args.mtbf_gpus or args.gpus
    failures = args.mtbf_hours * 3600 * of_gpus  # seconds of one GPU
    alone = (Tier(args.stall, args.restart, writing=args.save_seconds),)
    in_memory = Tier(args.snapshot_stall, args.snapshot_restart, args.snapshot_share, args.snapshot_seconds)
    both = two_tiers(alone[0], in_memory)
    rows: list[tuple[str, ...]] = [
        ("GPUs", "MTBF", "checkpoint every", "lost", "with snapshots every", "checkpoint every", "lost")
    ]
    for gpus in sorted({*SCALES, args.gpus}):
        mtbf = failures / gpus
        cells = [f"{gpus:,}" + " *" * (gpus == args.gpus), _span(mtbf)]
        for tiers in (alone, both):
            cells += [_span(tier.interval(mtbf)) for tier in reversed(tiers)]
            share = lost(tiers, mtbf)
            cells.append(f"{share:.2%}" if share <= HOLDS else f"> {HOLDS:.0%}")
        rows.append(tuple(cells))
    lines = [table(rows), ""]
    for name, tiers in (("durable checkpoints alone", alone), ("snapshots and durable checkpoints", both)):
        least = least_mtbf(tiers, args.goal)
        most = f"up to {int(failures / least):,} GPUs" if least else "at any scale"
        lines.append(f"at most {args.goal:.2%} lost with {name}: {most}")
    if args.step_seconds:
        own, (durable, snapshot) = (_steps(one, failures / args.gpus, args.step_seconds) for one in (alone, both))
        lines.append(
            f"in steps of {args.step_seconds:g} s at {args.gpus:,} GPUs: a checkpoint every {own[0]}; or a snapshot "
            f"every {snapshot} and a checkpoint every {durable}"
        )
    lines += [
        f"assumed: {args.mtbf_hours:g} h between failures at {of_gpus:,} GPUs, 1 / GPUs elsewhere; a durable "
        f"checkpoint stops training {args.stall:g} s, a restart from it takes {args.restart:g} s; a snapshot "
        f"{args.snapshot_stall:g} s and {args.snapshot_restart:g} s, for {args.snapshot_share:.0%} of failures",
        *(
            [f"written in {args.save_seconds:g} s and {args.snapshot_seconds:g} s; no interval is shorter"]
            if args.save_seconds or args.snapshot_seconds
            else []
        ),
        "lost = sum over tiers of stall / T + share (T / 2 + restart) / MTBF, at T = sqrt(2 stall MTBF / share) "
        "(Young 1974; tiers: Di et al. 2014)",
    ]
    return "\n".join(lines)


def _steps(tiers: Sequence[Tier], mtbf: float, step_seconds: float) -> list[str]:
    spans = (tier.interval(mtbf) / step_seconds for tier in tiers)
    return ["never" if math.isinf(steps) else f"{max(int(steps), 1):,}" for steps in spans]


def _span(seconds: float) -> str:
    if math.isinf(seconds):
        return "never"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
