"""``tools/plan.py schedule``: what a pipeline schedule costs, before any device is paid for."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.data.images import check_image
from megaforge.data.outputs import make_parents
from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Schedule, format_schedule, parse_schedule
from megaforge.parallel.pipeline.program import P2PBatch, Program, build_program, check_program
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.parallel.pipeline.simulator import Costs, Timeline, simulate
from megaforge.planning.schedule_drawing import draw_image, draw_text
from megaforge.registry import SCHEDULES, load_extensions


def make_parser(prog: str) -> ArgumentParser:
    """The command's flags."""
    parser = ArgumentParser(
        prog=prog, description="Draws a pipeline schedule: timeline, bubble share and peak live activations."
    )
    names = "; ".join(f"{name}: {SCHEDULES.get(name).text}" for name in SCHEDULES.names())
    parser.add_argument("--schedule", default="1f1b", help=names, metavar="NAME")
    parser.add_argument(
        "--extensions", nargs="+", default=(), metavar="FILE.py|MODULE", help="what registers schedules of your own"
    )
    parser.add_argument(
        "--schedule-file", type=Path, help="a schedule of your own: one line of actions per rank, F0.3 B0.3 ..."
    )
    parser.add_argument("--pp", type=integer(1, 1 << 20), default=4, help="pipeline ranks")
    parser.add_argument(
        "--vpp", type=integer(1, 1 << 20), help="stages per rank; 2 for interleaved and zb-v, else 1, unless given"
    )
    parser.add_argument(
        "--microbatches",
        type=integer(1, 1 << 20),
        default=8,
        help="microbatches of a global batch per data-parallel replica",
    )
    parser.add_argument(
        "--placement", default="loop", choices=("loop", "v"), help="where --schedule-file has its stages"
    )
    parser.add_argument(
        "--forward-cost", type=number(above=0), default=1.0, help="time of a stage's forward pass, in any unit"
    )
    parser.add_argument(
        "--backward-input-cost", type=number(above=0), default=1.0, help="time of the input half of its backward pass"
    )
    parser.add_argument(
        "--backward-weight-cost", type=number(above=0), default=1.0, help="time of the weight half of its backward pass"
    )
    parser.add_argument(
        "--communication-cost", type=number(0), default=0.0, help="time of a transfer between two ranks"
    )
    parser.add_argument(
        "--columns",
        type=integer(1, 1 << 20),
        help="cut the text timeline to this many characters (a terminal: to its width)",
    )
    parser.add_argument(
        "--output",
        "--png",
        type=Path,
        metavar="FILE",
        help="where to draw the timeline: a picture (.png, .svg, .pdf), or all that is printed (.txt)",
    )
    parser.add_argument(
        "--print-actions", action="store_true", help="also print every rank's actions, as --schedule-file reads them"
    )
    return parser


def run(arguments: Sequence[str], prog: str = "plan.py") -> int:
    """The command; see :func:`main`."""
    return main(make_parser(prog).parse_args(arguments))


def main(args: argparse.Namespace) -> int:
    """Checks, simulates, prints and draws the schedule.

    Raises:
        UserError: the schedule is not defined for these numbers, is incomplete, or could deadlock.
    """
    suffix = None if args.output is None else check_image(args.output, others=(".txt",))
    schedule = _schedule(args)
    costs = Costs(args.forward_cost, args.backward_input_cost, args.backward_weight_cost, args.communication_cost)
    program = build_program(schedule, costs)
    check_program(schedule, program)
    timeline = simulate(schedule, costs)
    rest = ["", summary(timeline, program)]
    if args.print_actions:
        rest += ["", format_schedule(schedule)]
    # On a terminal broken lines would show nothing.
    columns = args.columns or (shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    print("\n".join([draw_text(timeline, columns), *rest]))
    if suffix == ".txt":
        _write_text(args.output, "\n".join([draw_text(timeline, args.columns), *rest]))
    elif suffix is not None:
        draw_image(timeline, args.output)
    if suffix is not None:
        print(f"\nwrote {args.output}")
    return 0


def _write_text(path: Path, text: str) -> None:
    make_parents(path, "--output")
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error


def _schedule(args: argparse.Namespace) -> Schedule:
    if args.schedule_file is None:
        _ = load_extensions(tuple(args.extensions))
        vpp = args.vpp or SCHEDULES.get(args.schedule).least_chunks
        return build_schedule(args.schedule, pp=args.pp, vpp=vpp, microbatches=args.microbatches)
    try:
        text = args.schedule_file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--schedule-file {args.schedule_file}: {error.strerror}") from error
    args.schedule = args.schedule_file.stem
    return parse_schedule(text, str(args.schedule_file), args.vpp or 1, args.placement)


def summary(timeline: Timeline, program: Program) -> str:
    """A table by rank, and the shares of all ranks together."""
    schedule, costs = timeline.schedule, timeline.costs
    lines = [
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_chunks} stages each, "
        f"{schedule.num_microbatches} microbatches",
        f"assumed per stage and microbatch: forward {costs.forward:g}, backward inputs {costs.backward_input:g}, "
        f"weights {costs.backward_weight:g}, transfer {costs.communication:g}",
        "checked: every action once and in order; no deadlock, even if sends and receives blocked",
        "",
        "rank  stages        busy   bubble  idle inside  peak live activations  transfers",
        "                                   own window   (stages' / whole rank's)",
    ]
    for rank in range(schedule.num_ranks):
        peak = timeline.peak_live(rank)
        transfers = sum(len(step.transfers) for step in program[rank] if isinstance(step, P2PBatch))
        stages = ",".join(map(str, schedule.stages_of(rank)))
        lines.append(
            f"{rank:>4}  {stages:<10} {timeline.busy(rank):>7g}  {100 * timeline.bubble_share(rank):>6.2f}%  "
            f"{timeline.window_bubble(rank):>11g}  {peak:>10g} / {peak / schedule.num_chunks:<9g} {transfers:>9}"
        )
    lines.append(f"all: time {timeline.makespan:g}, bubble share {100 * timeline.bubble_share():.2f}%")
    return "\n".join(lines)
