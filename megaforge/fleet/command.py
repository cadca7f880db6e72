"""``tools/train_fleet.py``: trains several models, or shows how far they are."""

from __future__ import annotations

import dataclasses
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaforge.config.arguments import ArgumentParser, number
from megaforge.config.schema import Setting, setting_for
from megaforge.errors import UserError
from megaforge.fleet.recipe import FleetSettings, check_models, read_fleet
from megaforge.fleet.supervisor import Supervisor
from megaforge.monitor.runs_folder import Runs
from megaforge.planning.table import table

TRAIN = """Trains several models: one after the other, or several at once, each in processes of its own.

    python tools/train_fleet.py --config examples/fleet/fleet.yaml --output runs/fleet
    python tools/train_fleet.py --config examples/fleet/fleet.yaml --output runs/fleet --mode parallel --workers 3
    python tools/train_fleet.py show runs/fleet

Run again after a kill, it goes on; what is complete is not trained again. Status 0: all are complete, 1: some failed,
3: something is left to do. docs/fleet.md has more."""


def _settings() -> list[Setting]:
    hints = typing.get_type_hints(FleetSettings)
    return [setting_for("fleet", one, hints[one.name]) for one in dataclasses.fields(FleetSettings)]


def _given(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(the file, what the line says in place of it)."""
    parser = ArgumentParser(prog="train_fleet.py", description=TRAIN)
    parser.add_argument("--config", required=True, metavar="FILE", help="fleet.yaml: models, their flags, settings")
    for one in _settings():
        shown = "" if one.default is None else f" [{one.default}]"
        metavar = "{" + ",".join(one.choices) + "}" if isinstance(one.choices, tuple) else "VALUE"
        parser.add_argument(one.flag, dest=one.name, metavar=metavar, help=(one.help + shown).replace("%", "%%"))
    flags = vars(parser.parse_args(words))
    found: dict[str, Any] = {}
    for one in _settings():
        text = flags[one.name]
        if text is not None:
            try:
                found[one.name] = one.parse(text)
            except ValueError as error:
                raise UserError(f"{one.flag} {text}: {error}") from error
    return flags["config"], found


def train(words: Sequence[str]) -> int:
    """``train_fleet.py --config ...``; returns the exit status."""
    path, given = _given(words)
    fleet = read_fleet(path)
    fleet = dataclasses.replace(fleet, settings=dataclasses.replace(fleet.settings, **given))
    fleet.settings.validate()
    check_models(fleet.models, Path(fleet.settings.output or "."))
    return Supervisor(fleet).run()


def show(words: Sequence[str]) -> int:
    """``train_fleet.py show DIR``: how far the runs below a folder are, and what became of them."""
    parser = ArgumentParser(prog="train_fleet.py show", description=show.__doc__)
    parser.add_argument("runs", metavar="DIR", help="a fleet's output, or any folder of runs")
    parser.add_argument("--follow", type=number(0.1, 3600), metavar="SECONDS", help="show it again after so many")
    flags = parser.parse_args(words)
    if not Path(flags.runs).is_dir():
        raise UserError(f"{flags.runs}: is not a directory; name a fleet's output or a folder of runs")
    runs = Runs(flags.runs)
    while True:
        while runs.poll().behind:
            pass
        print(_shown(runs), flush=True)
        if flags.follow is None:
            return 0
        time.sleep(flags.follow)


def _shown(runs: Runs) -> str:
    fleet = runs.fleets.get(".")
    names = list(runs.runs) if fleet is None else fleet.runs()
    if not names:
        return f"{runs.directory}: no runs yet"
    overall = runs.overall(names)
    eta = "" if overall.eta_seconds in (None, 0.0) else f", {(overall.eta_seconds or 0.0) / 60:.1f} min left"
    rows = [["run", "status", "steps", "of", "loss", "reason"]]
    for name in names:
        run = runs.runs.get(name)
        loss = None if run is None else run.steps.last().get("loss")
        rows.append(
            [
                name,
                "waiting" if run is None else str(run.status),
                "0" if run is None else str(run.iteration),
                "?" if run is None or run.train_iters is None else str(run.train_iters),
                "-" if loss is None else f"{loss:.4f}",
                "" if run is None else run.reason[:80],
            ]
        )
    return f"{overall.line()}{eta}\n{table(rows)}"


def main() -> int:
    """Runs the command; returns the exit status."""
    words = sys.argv[1:]
    return show(words[1:]) if words[:1] == ["show"] else train(words)
