#!/usr/bin/env python3
"""Watches runs by their files, and tells what a process that is dead or stuck cannot say of itself.

    python tools/watch_runs.py --runs runs --alert-webhook env:PAGER_URL
    python tools/watch_runs.py --runs runs --once

The first line goes on until it is ended: it raises the alerts failure and no_heartbeat of every run below runs, those
of its audit trail and compliance report, those that the run raises itself, and disk where the folder's disk is full.
Each is printed, told to the webhook and the program, and kept in alerts.jsonl beside the run's events.jsonl; started
again, it goes on from there. --once looks once, prints what is wrong, and ends with status 1 where something is: for
cron. Needs no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.alert_config import AlertConfig
from megaforge.config.arguments import ArgumentParser, number, part_of
from megaforge.config.entry import run_entry
from megaforge.errors import UserError
from megaforge.registry import ALERTS

if TYPE_CHECKING:
    from megaforge.monitor.alerts import Alert
    from megaforge.monitor.watcher import Watcher


class Printer:
    """Alerts as lines with times on standard output."""

    def tell(self, alert: Alert) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(alert.time)), alert.line(), flush=True)

    def close(self, seconds: float) -> None:
        """Nothing is left."""


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", metavar="DIR", required=True, help="a folder of runs, or one run's --save")
    parser.add_argument("--once", action="store_true", help="look once; status 1 where something is wrong")
    parser.add_argument("--interval", type=number(above=0), default=10.0, metavar="S", help="seconds between looks")
    parser.add_argument(
        "--heartbeat-minutes",
        type=number(above=0),
        default=10.0,
        metavar="X",
        help="no_heartbeat: of a run that has told nothing for so long; more than its longest step, save or load takes",
    )
    parser.add_argument(
        "--since-hours",
        type=number(above=0),
        default=24.0,
        metavar="X",
        help="runs that do not run, and of which nothing was heard for so long, are not watched",
    )
    default = AlertConfig()
    parser.add_argument(
        "--alerts-off", nargs="+", type=part_of(ALERTS), default=[], metavar="NAME", help="alerts that are never raised"
    )
    parser.add_argument("--alert-webhook", metavar="URL|env:NAME", help="alerts are posted there as JSON")
    parser.add_argument("--alert-command", metavar="CMD", help="is started for each alert, with JSON as its input")
    parser.add_argument(
        "--alert-repeat-minutes",
        type=number(0),
        default=default.alert_repeat_minutes,
        metavar="X",
        help="an alert is told at most once in this time, and again after it while it lasts",
    )
    parser.add_argument(
        "--alert-disk-share",
        type=number(above=0, most=1),
        default=default.alert_disk_share,
        metavar="X",
        help="disk: the folder's disk is fuller",
    )
    return parser


def once(watcher: Watcher) -> int:
    """Looks once; prints what is wrong, old alerts too."""
    watcher.look()
    for run, alerts in watcher.firing.items():
        for name, text in alerts.items():
            print(f"{run}: {name}: {text}")
    watcher.close()
    what = f"{watcher.watched} runs are watched"
    if watcher.passed_over:
        what += f"; of {len(watcher.passed_over)} nothing was heard for too long: {', '.join(watcher.passed_over[:20])}"
    print(what, file=sys.stderr)
    return int(bool(watcher.firing or watcher.problems))


def go_on(watcher: Watcher, interval: float) -> int:
    """Looks until a signal ends it."""
    ended = threading.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda *_: ended.set())
    said: set[str] = set()
    while not ended.is_set():
        watcher.look()
        for name, problem in watcher.problems.items():
            if name not in said:
                print(f"run {name} cannot be watched: {problem}", file=sys.stderr, flush=True)
        said |= watcher.problems.keys()
        ended.wait(interval)
    watcher.close()
    return 0


def main() -> int:
    """Watches."""
    flags = make_parser().parse_args()
    if not Path(flags.runs).is_dir():
        raise UserError(f"--runs {flags.runs}: no such directory; name a folder of runs, or what a run has as --save")
    alerts = AlertConfig(
        alerts_off=tuple(flags.alerts_off),
        alert_webhook=flags.alert_webhook,
        alert_command=flags.alert_command,
        alert_repeat_minutes=flags.alert_repeat_minutes,
        alert_disk_share=flags.alert_disk_share,
    )
    alerts.validate()
    from megaforge.monitor.alert_channels import receivers_of
    from megaforge.monitor.watcher import Watcher

    channels = [*([] if flags.once else [Printer()]), *receivers_of(alerts)]
    watcher = Watcher(
        Path(flags.runs),
        alerts,
        channels,
        heartbeat_minutes=flags.heartbeat_minutes,
        since_hours=flags.since_hours,
    )
    return once(watcher) if flags.once else go_on(watcher, flags.interval)


if __name__ == "__main__":
    run_entry(main)
