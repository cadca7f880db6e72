"""Draws cases, runs them, and says which ended as none may."""

from __future__ import annotations

import os
import random
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.sweep.commands import COMMANDS, make_world
from tests.sweep.isolated import Ending, flags_of, import_once, run_forked
from tests.sweep.wrong import Case, damage, draw_case


@dataclass(frozen=True)
class Finding:
    """A case that ended as none may, and why."""

    command: str
    case: Case
    why: str
    ending: Ending

    def __str__(self) -> str:
        line = " ".join(map(shlex.quote, (COMMANDS[self.command].script, *self.case.arguments)))
        extra = f"\n    with {self.case.content}" if self.case.content else ""
        extra += "\n    with its output closed" if self.case.closed_stdout else ""
        tail = "".join(f"\n    | {text[:240]}" for text in (self.ending.out + self.ending.err).splitlines()[-6:])
        return f"{self.why} (status {self.ending.status}): {line[:600]}{extra}{tail}".encode(errors="replace").decode()


def build_world(folder: Path) -> Path:
    """The world of :func:`make_world` and a link that leads to itself."""
    import_once()
    world = folder / "world"
    world.mkdir()
    (world / "loop").symlink_to("loop")
    make_world(world, lambda script, arguments, where: run_forked(script, arguments, where).status)
    return world


def sweep(command: str, world: Path, cases: int, seed: int) -> Iterator[Finding]:
    """Runs ``cases`` cases of ``command``, the same for the same seed, and yields what is wrong with them."""
    entry = COMMANDS[command]
    flags, draw = flags_of(entry.script, entry.arguments), random.Random(f"{seed} {command}")
    for number in range(cases):
        # First the line as it stands: were it refused itself, every wrong one would be, for another reason.
        case = draw_case(entry, flags, draw) if number else Case(entry.arguments, False, right=True)
        copy = world.with_name(f"{command.replace(' ', '_')}-{number}")
        shutil.copytree(world, copy, symlinks=True, copy_function=os.link)
        if case.content is None or damage(copy, case.content):
            ending = run_forked(entry.script, case.arguments, copy, closed_stdout=case.closed_stdout)
            why = fault(case, ending)
            if why:
                yield Finding(command, case, why, ending)
        shutil.rmtree(copy, ignore_errors=True)


def fault(case: Case, ending: Ending) -> str | None:
    """What no ending may be; None when it is fine."""
    complaints = [line for line in ending.err.splitlines() if line.startswith("error")]
    if ending.hung:
        return "it hangs"
    if "Traceback" in ending.err or "Traceback" in ending.out:
        return "a traceback"
    if ending.status < 0:
        return "killed by a signal"
    if case.closed_stdout:
        return None
    if ending.status == 0:
        return "accepted without a word" if case.wrong else None
    if case.right:
        return "a line that works is refused"
    if not complaints:
        return "it fails without an error line"
    if len(complaints) > 1:
        return "more than one error line"
    if case.wrong and case.named and not any(word in complaints[0] for word in case.named if word):
        return "the error names neither flag nor value"
    return None
