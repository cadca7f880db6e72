"""Random wrong inputs for every command; ``python -m tests.sweep`` draws more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.launch import REPO
from tests.sweep.commands import COMMANDS
from tests.sweep.isolated import Ending, flags_of
from tests.sweep.sweep import fault
from tests.sweep.wrong import Case

CASES = 20


@pytest.fixture(scope="module")
def findings() -> dict[str, str]:
    """What the sweep says of each command; it forks, so it has a process of its own."""
    command = [sys.executable, "-m", "tests.sweep", "--cases", str(CASES), "--json"]
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_wrong_input_passes_or_ends_in_a_traceback(findings: dict[str, str], command: str) -> None:
    assert findings[command] == ""


def ending(status: int, err: str = "", hung: bool = False) -> Ending:
    return Ending(status, "", err, hung)


@pytest.mark.parametrize(
    ("wrong", "end", "why"),
    [
        (True, ending(2, "error: --x 1: no\n"), None),
        (False, ending(0), None),
        (True, ending(0), "accepted without a word"),
        (True, ending(1, "Traceback (most recent call last):\n"), "a traceback"),
        (False, ending(1, "Traceback (most recent call last):\n"), "a traceback"),
        (True, ending(2, "usage: x\n"), "it fails without an error line"),
        (True, ending(2, "error: a\nerror: b\n"), "more than one error line"),
        (True, ending(2, "error: something is wrong\n"), "the error names neither flag nor value"),
        (True, ending(-9, hung=True), "it hangs"),
        (False, ending(-11), "killed by a signal"),
    ],
)
def test_the_judge_sees_each_fault(wrong: bool, end: Ending, why: str | None) -> None:
    assert fault(Case(("--x", "1"), wrong, ("--x",)), end) == why


def test_the_judge_sees_a_line_that_works_refused() -> None:
    right = Case(("--x", "1"), False, right=True)
    assert fault(right, ending(2, "error: --x 1: no\n")) == "a line that works is refused"
    assert fault(right, ending(0)) is None


def test_flags_come_from_the_commands_own_parser() -> None:
    entry = COMMANDS["pretrain"]
    kinds = {flag.name: flag.kind for flag in flags_of(entry.script, entry.arguments)}
    assert (kinds["--train-iters"], kinds["--lr"], kinds["--device"]) == ("int", "float", "choice")
    assert (kinds["--save"], kinds["--bf16"]) == ("text", "switch")
