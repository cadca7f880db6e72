"""What people type: command lines that work, with one thing made wrong."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.sweep.commands import Command
from tests.sweep.isolated import Flag

NOT_NUMBERS = ("x", "", "nan", "inf", "-inf", "1e400", "1e-310", "1,5", "0x10", "--", "1_", "²")
NOT_INTEGERS = (*NOT_NUMBERS, "1.5", str(2**64), str(-(2**63) - 1), "1e300")
PERHAPS_NUMBERS = ("0", "-1", "1", "3", "0.5", "-0.0", "1e-300", "17")
NO_PATHS = ("", "nowhere/at/all", "c.jsonl/below", "x" * 300, "loop")
NO_OUTPUTS = ("", "/proc/none/x", "c.jsonl/below", "x" * 300)
# Of text flags: where something is read from, and where something is written.
READS = {
    *("--load", "--input", "--config", "--tokenizer-model", "--data-path", "--metrics-file", "--train-data"),
    *("--prompt-file", "--vocab-file", "--merge-file", "--chat-template"),
}
WRITES = {"--save", "--output", "--output-prefix", "--holdout-output"}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "cut": lambda old: old[: len(old) // 2 - 1],
    "noise": lambda old: bytes(random.Random(len(old)).randbytes(max(len(old), 64))),
    "zeros": lambda old: bytes(len(old)),
    "bom": lambda old: b"\xef\xbb\xbf" + old,
    "utf-16": lambda old: old.decode(errors="replace").encode("utf-16"),
    "latin-1": lambda old: old.replace(b"cat", b"caf\xe9"),
    "surrogate": lambda old: old.replace(b"cat", b"\\ud83d"),
    "crlf": lambda old: old.replace(b"\n", b"\r\n"),
    "deep": lambda old: b"[" * 20_000,
    "list": lambda old: b"[1, 2]\n",
    "gzip": lambda old: gzip.compress(old),
    "number": lambda old: old.replace(b'"text": "', b'"text": 1, "other": "'),
}


@dataclass(frozen=True)
class Case:
    """One attempt.

    Attributes:
        arguments: the command line.
        wrong: it must be refused; otherwise it may also succeed.
        named: words of which the error must hold one.
        content: (file of the world, name of what becomes of it), or None.
        closed_stdout: nobody reads the output.
        right: it must succeed.
    """

    arguments: tuple[str, ...]
    wrong: bool
    named: tuple[str, ...] = ()
    content: tuple[str, str] | None = None
    closed_stdout: bool = False
    right: bool = False


def draw_case(command: Command, flags: list[Flag], draw: random.Random) -> Case:
    """A case of ``command``, whose parser has ``flags``."""
    kinds: list[Callable[[], Case]] = [lambda: _value(command, draw.choice(flags), draw)] * 6
    kinds += [lambda: _structure(command, flags, draw)]
    if not command.only_wrong:
        kinds += [lambda: Case(command.arguments, False, closed_stdout=True)]
    if command.reads:
        kinds += [lambda: _content(command, draw)] * 2
    return draw.choice(kinds)()


def _value(command: Command, flag: Flag, draw: random.Random) -> Case:
    """A flag with a value that it cannot take, or perhaps cannot."""
    if flag.kind == "switch":
        return Case((*command.arguments, f"{flag.name}=maybe"), True, (flag.name,))
    if flag.kind == "choice":
        value, wrong = draw.choice(("nonsense", "", "None ", "\udcff\udcfe")), True
    elif flag.kind in ("int", "float"):
        bad = NOT_INTEGERS if flag.kind == "int" else NOT_NUMBERS
        wrong = command.only_wrong or draw.random() < 0.6
        value = draw.choice(bad if wrong else PERHAPS_NUMBERS)
    elif flag.name in READS or flag.name in WRITES:
        # Training writes its metrics; what plots them reads them.
        written = flag.name in WRITES or (flag.name == "--metrics-file" and command.script == "pretrain_cdrmix.py")
        value, wrong = draw.choice(NO_OUTPUTS if written else NO_PATHS), not command.reads_nothing
    elif command.only_wrong:
        value, wrong = "\udcff", False
    else:
        value, wrong = draw.choice(("", "\udcff\udce9", "a b", "-", "x" * 5000, "\n")), False
    return Case(_with(command.arguments, flag, value), wrong, (flag.name, value) if value else (flag.name,))


def _structure(command: Command, flags: list[Flag], draw: random.Random) -> Case:
    """A line whose words do not fit together."""
    required = [flag for flag in flags if flag.required and flag.name in command.arguments]
    choices: list[Case] = [
        Case((*command.arguments, "--nonsense", "1"), True, ("--nonsense",)),
        Case((*command.arguments, "word"), True, ("word",)),
        Case((*command.arguments, "--Load", "r"), True, ("--Load",)),
        Case((*command.arguments, draw.choice([f for f in flags if f.kind != "switch"]).name), True),
    ]
    for flag in required:
        choices.append(Case(_without(command.arguments, flag.name), True, (flag.name,)))
    if command.arguments[-1:] and _last_takes_many(command, flags):
        choices.pop(1)  # there a further word is a further value
    return draw.choice(choices)


def _content(command: Command, draw: random.Random) -> Case:
    """A file of the world with other bytes."""
    return Case(command.arguments, False, content=(draw.choice(command.reads), draw.choice(list(CONTENTS))))


def _last_takes_many(command: Command, flags: list[Flag]) -> bool:
    last = next(word for word in reversed(command.arguments) if word.startswith("--"))
    return any(flag.name == last and flag.takes_many for flag in flags)


def _with(arguments: tuple[str, ...], flag: Flag, value: str) -> tuple[str, ...]:
    """The arguments with the flag's value replaced or added; ``--flag=value``, so that a value may look like a flag."""
    kept = _without(arguments, flag.name)
    return (*kept, flag.name, value) if flag.takes_many else (*kept, f"{flag.name}={value}")


def _without(arguments: tuple[str, ...], name: str) -> tuple[str, ...]:
    kept, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = word == name
        if not skipping:
            kept.append(word)
    return tuple(kept)


def damage(world: Path, content: tuple[str, str]) -> bool:
    """Changes a file of the copied world; False where there is none of that name."""
    pattern, change = content
    paths = sorted(world.glob(pattern))
    for path in paths[:1]:
        old = path.read_bytes()
        path.unlink()  # it may be a second name of the world's own file
        path.write_bytes(CONTENTS[change](old))
    return bool(paths)
