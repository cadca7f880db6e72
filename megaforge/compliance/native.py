"""C++ and CUDA: functions as lizard finds them, without comments and texts."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import NamedTuple

from megaforge.compliance.code import Code, NativeFile

MISSING = "lizard is not installed (extra 'compliance'), and C++ and CUDA are not measured"
_TEXTS = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)


class NativeFunction(NamedTuple):
    """A function of C++ or CUDA.

    Attributes:
        place: file and line.
        name: without namespaces and classes.
        parameters: how many.
        lines: from its first to its last one.
        text: those lines, comments and texts blanked.
    """

    place: str
    name: str
    parameters: int
    lines: int
    text: str


def available() -> bool:
    """Whether functions can be told apart here."""
    return importlib.util.find_spec("lizard") is not None


def plain(source: str) -> str:
    """``source`` with blanks in place of comments and texts; lines stay where they are."""
    return _TEXTS.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)


@functools.lru_cache(maxsize=2)
def functions(code: Code) -> list[NativeFunction]:
    """All of the code."""
    return [function for file in code.native for function in _of_file(file)]


def _of_file(file: NativeFile) -> Iterator[NativeFunction]:
    import lizard

    lines = plain(file.source).split("\n")
    for found in lizard.analyze_file.analyze_source_code(file.path, file.source).function_list:
        name = re.split(r"::", found.name)[-1].strip()
        text = "\n".join(lines[found.start_line - 1 : found.end_line])
        length = found.end_line - found.start_line + 1
        yield NativeFunction(f"{file.path}:{found.start_line}", name, found.parameter_count, length, text)


def calls_itself(function: NativeFunction) -> bool:
    """Whether its body calls a function of its name with as many arguments; an overload of another class or namespace
    does not count."""
    body = function.text.partition("{")[2]
    for found in re.finditer(rf"(?<![\w:.>~]){re.escape(function.name)}(?:<[^;{{}}]*?>)?\(", body):
        if _arguments(body, found.end()) == function.parameters:
            return True
    return False


def _arguments(text: str, start: int) -> int:
    """Of a call whose parenthesis opens before ``start``."""
    depth, count = 1, 0
    for place in range(start, len(text)):
        letter = text[place]
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return count + bool(text[start:place].strip())
        count += letter == "," and depth == 1
    return -1
