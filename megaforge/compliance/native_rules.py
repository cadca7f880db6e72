"""Rules 8 and 9, which are of C++ and CUDA alone: the preprocessor, and pointers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megaforge.compliance import native
from megaforge.compliance.code import Code
from megaforge.compliance.measure import Measure, Rule, measured, not_measured

_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(include|define|if|ifdef|ifndef|elif)\b(.*(?:\\\n.*)*)", re.MULTILINE)
_POINTERS = {
    "two dereferences in one expression": re.compile(
        r"->\s*\w+\s*(?:\([^()]*\)|\[[^\[\]]*\])*\s*->|(?<![\w)\]*])\*\*\w"
    ),
    "a pointer to a pointer": re.compile(r"\w\s*\*\s*(?:const\s*)?\*"),
    "a pointer to a function": re.compile(r"\(\s*\*\s*\w*\s*\)\s*\("),
}
_NONE = "there is no C++ or CUDA in this code"


def preprocessor(code: Code) -> Measure:
    """Directives that include a file or define a simple macro."""
    if not code.native:
        return not_measured("directives", _NONE)

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for file in code.native:
            for found in _DIRECTIVE.finditer(file.source):
                place = f"{file.path}:{file.source.count(chr(10), 0, found.start()) + 1}"
                yield place, _directive_problem(found[1], native.plain(found[2]))

    return measured("directives", verdicts())


def _directive_problem(kind: str, rest: str) -> str | None:
    if kind == "include":
        return None
    if kind != "define":
        return f"conditional compilation: #{kind}{rest.rstrip():.60}"
    if "##" in rest:
        return "a macro that pastes tokens"
    return "a macro of any number of arguments" if "..." in rest else None


def pointers(code: Code) -> Measure:
    """Functions with one level of dereferencing and no pointer to a function."""
    if not code.native:
        return not_measured("functions", _NONE)
    if not native.available():
        return not_measured("functions", native.MISSING)

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for one in native.functions(code):
            bad = next((text for text, pattern in _POINTERS.items() if pattern.search(one.text)), None)
            yield one.place, None if bad is None else f"{one.name}: {bad}"

    return measured("functions", verdicts())


PREPROCESSOR = Rule(
    8,
    "the preprocessor includes files and defines simple macros",
    "conditional compilation, macros that paste tokens or take any number of arguments, in C++ and CUDA",
    preprocessor,
)
POINTERS = Rule(
    9,
    "one dereference, no pointer to a function",
    "functions of C++ and CUDA with pointers to pointers, chains of ->, or pointers to functions",
    pointers,
)
