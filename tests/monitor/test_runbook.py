"""The runbook quotes messages that the program has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).parents[2]
_WORDS, _SHORTEST = 3, 10  # words in a row, and their letters, that say which message it is
# Put together of pieces of one or two words; looked up by hand.
PIECED = {
    "the variable RANK is empty",
    "--world-size 8: 4 ranks were started",
    "snapshots.json is damaged",
    "--elastic 16:64: 8 ranks were started; wait until 16 are there",
}


def quoted() -> list[str]:
    """The messages that the tables of ``docs/operations.md`` explain."""
    found, inside = [], False
    for line in (REPO / "docs/operations.md").read_text(encoding="utf-8").splitlines():
        inside = line.startswith("| message |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| message |", "|---")):
            found += [text for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if len(text.split()) >= _WORDS]
    return found


def texts() -> str:
    """Every text in the program, one a line."""
    parts = []
    for file in [*(REPO / "megaforge").rglob("*.py"), *(REPO / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    scripts = (REPO / "run_scripts").rglob("*.s*")
    return "\n".join([*parts, *(file.read_text(encoding="utf-8") for file in scripts if file.is_file())])


def known(message: str, program: str) -> bool:
    """Whether some stretch of ``message`` stands in the program: names and numbers in it are examples."""
    words = message.split()
    runs = (" ".join(words[first : first + _WORDS]).strip(":;,.()'") for first in range(len(words) - _WORDS + 1))
    return any(len(run) >= _SHORTEST and run in program for run in runs)


def test_every_message_of_the_runbook_is_one_of_the_program() -> None:
    messages, program = quoted(), texts()
    assert len(messages) > 60
    assert {message for message in messages if not known(message, program)} <= PIECED


def test_a_message_that_nothing_says_is_found() -> None:
    assert not known("the moon is unreachable: 3", "the run is unusable\nthe sun")
    assert known("step 3: it runs in circles", "%s: it runs in circles, or")
