"""Runs steps one after the other, whatever becomes of each, and writes what was measured beside what was expected."""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LAST_LINES = 40  # of a step's output in the report


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        name: what it is, with its unit.
        expected: in words.
        read: the value out of a step's output, None where it is not there.
        low, high: between which a number is as expected; None: no bound.
        equal: what a value must be, for values that are no numbers.
    """

    name: str
    expected: str
    read: Callable[[str], str | None]
    low: float | None = None
    high: float | None = None
    equal: str | None = None

    def verdict(self, value: str) -> str:
        """``as expected``, ``differs``, or nothing where there is no bound."""
        if self.equal is not None:
            return "as expected" if value == self.equal else "differs"
        if self.low is None and self.high is None:
            return ""
        try:
            number = float(value.replace(",", ""))
        except ValueError:
            return "differs"
        fits = (self.low is None or number >= self.low) and (self.high is None or number <= self.high)
        return "as expected" if fits else "differs"


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds, and what to read from it.

    ``needs`` is a program that must be on PATH; ``shows`` puts the end of the output into the report even when all
    went well.
    """

    name: str
    command: Sequence[str]
    limit: float
    figures: Sequence[Figure] = ()
    needs: str | None = None
    shows: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ``status`` is ``done`` or says why not; ``values`` are those of its figures."""

    step: Step
    status: str
    seconds: float
    output: str
    values: tuple[str | None, ...]

    def verdicts(self) -> list[str]:
        """What is to be said of each figure."""
        pairs = zip(self.step.figures, self.values, strict=True)
        return ["not measured" if value is None else figure.verdict(value) for figure, value in pairs]

    def as_expected(self) -> bool:
        """Whether the step ended well and no figure is missing or off."""
        return self.status == "done" and not {"not measured", "differs"} & set(self.verdicts())


def pattern(regex: str) -> Callable[[str], str | None]:
    """Reads the first group of the last match, ``^`` and ``$`` being those of a line."""

    def read(output: str) -> str | None:
        found = list(re.finditer(regex, output, re.MULTILINE))
        return found[-1].group(1) if found else None

    return read


def run_step(step: Step, limit: float, environment: dict[str, str]) -> Outcome:
    """Runs ``step`` for at most ``limit`` seconds; its children end with it."""
    if step.needs is not None and not _on_path(step.needs, environment):
        return Outcome(step, f"left out: {step.needs} is not on PATH", 0.0, "", (None,) * len(step.figures))
    start = time.monotonic()
    status = "done"
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(step, f"failed: {error}", 0.0, "", (None,) * len(step.figures))
    try:
        output, _ = process.communicate(timeout=limit)
        if process.returncode:
            status = f"failed: exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        output, status = _stop(process), f"stopped after {limit:.0f} seconds"
    values = tuple(figure.read(output) for figure in step.figures)
    return Outcome(step, status, time.monotonic() - start, output, values)


def _stop(process: subprocess.Popen[str]) -> str:
    """Ends a step and its children, and returns what it had printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            return process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def _on_path(program: str, environment: dict[str, str]) -> bool:
    return any(os.access(Path(folder) / program, os.X_OK) for folder in environment.get("PATH", "").split(os.pathsep))


def run_steps(
    steps: Sequence[Step],
    total: float,
    environment: dict[str, str],
    after: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """All steps within ``total`` seconds; ``after`` sees what there is after each, so that a lost machine loses little.

    A step that takes longer than what is left is stopped then; the steps behind it are left out, saying so.
    """
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for step in steps:
        left = total - (time.monotonic() - start)
        if left <= 1:
            outcomes.append(Outcome(step, "left out: no time left", 0.0, "", (None,) * len(step.figures)))
        else:
            print(f"== {step.name}", flush=True)
            outcomes.append(run_step(step, min(step.limit, left), environment))
            print(f"   {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        after(outcomes)
    return outcomes


def report(outcomes: Sequence[Outcome], about: Sequence[str]) -> str:
    """The page: one line a figure, then what the steps printed where it matters."""
    lines = ["# First day on a GPU", "", "Written by `bash run_scripts/gpu_first_day.sh`.", ""]
    lines += [f"- {_cell(line)}" for line in about]
    lines += ["", "| step | figure | measured | expected | verdict |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        ended = "as expected" if outcome.status == "done" else "differs"
        took = f"{outcome.status}, {outcome.seconds:.0f} s"
        lines.append(_row(outcome.step.name, "status", took, f"done in {outcome.step.limit:.0f} s", ended))
        for figure, value, verdict in zip(outcome.step.figures, outcome.values, outcome.verdicts(), strict=True):
            lines.append(_row("", figure.name, "-" if value is None else value, figure.expected, verdict))
    for outcome in outcomes:
        if outcome.output and (outcome.step.shows or not outcome.as_expected()):
            last = outcome.output.rstrip("\n").splitlines()[-LAST_LINES:]
            command = " ".join(outcome.step.command)
            lines += ["", f"## {outcome.step.name}", "", f"`{command}`: {outcome.status}", "", "<pre>"]
            lines += [html.escape(line) for line in last] + ["</pre>"]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(path: Path, text: str) -> None:
    """Writes the whole page or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)
