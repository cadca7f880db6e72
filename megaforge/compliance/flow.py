"""Rules 1, 2 and 4: how control flows, and how long a function is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from megaforge.compliance import native
from megaforge.compliance.calls import Calls, in_cycles
from megaforge.compliance.code import Code
from megaforge.compliance.measure import Measure, Rule, measured

LONGEST = 60  # lines of a function
_JUMPS = re.compile(r"\b(goto|setjmp|longjmp)\b")
_ENDLESS = re.compile(r"\bfor\s*\(\s*;\s*;|\bwhile\s*\(\s*(?:true|1)\s*\)")
_LOOP = re.compile(r"\b(?:for|while)\s*\(")


def _note() -> str:
    return "" if native.available() else native.MISSING


def recursion(code: Code) -> Measure:
    """Functions that neither reach themselves nor jump."""
    looped = in_cycles(Calls(code).graph())

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for module, function in code.functions:
            bad = (module.dotted, function.name) in looped
            yield f"{module.path}:{function.node.lineno}", f"{function.name} reaches itself" if bad else None
        for one in native.functions(code) if native.available() else ():
            jump = _JUMPS.search(one.text)
            bad_text = f"{one.name} has a {jump[0]}" if jump else f"{one.name} calls itself"
            yield one.place, bad_text if jump or native.calls_itself(one) else None

    return measured("functions", verdicts(), _note())


def bounded_loops(code: Code) -> Measure:
    """Loops with a condition or a sequence that ends them."""

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for module in code.modules:
            for node in module.nodes:
                if isinstance(node, ast.While):
                    endless = isinstance(node.test, ast.Constant) and bool(node.test.value)
                    yield f"{module.path}:{node.lineno}", "a loop without an end of its own" if endless else None
                elif isinstance(node, ast.For | ast.AsyncFor):
                    counts = ast.unparse(node.iter)
                    endless = re.fullmatch(r"(itertools\.)?(count|cycle|repeat)\(.*\)", counts, re.DOTALL) is not None
                    yield f"{module.path}:{node.lineno}", f"a loop over {counts:.60}" if endless else None
        for file in code.native:
            text = native.plain(file.source)
            for loop in _LOOP.finditer(text):
                endless = _ENDLESS.match(text, loop.start()) is not None
                place = f"{file.path}:{text.count(chr(10), 0, loop.start()) + 1}"
                yield place, "a loop without an end of its own" if endless else None

    return measured("loops", verdicts())


def short_functions(code: Code) -> Measure:
    """Functions of at most :data:`LONGEST` lines, documentation included."""

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for module, function in code.functions:
            bad = function.lines > LONGEST
            yield (
                f"{module.path}:{function.node.lineno}",
                f"{function.name} has {function.lines} lines" if bad else None,
            )
        for one in native.functions(code) if native.available() else ():
            yield one.place, f"{one.name} has {one.lines} lines" if one.lines > LONGEST else None

    return measured("functions", verdicts(), _note())


RECURSION = Rule(
    1,
    "simple control flow: no goto, no recursion",
    "functions that reach themselves, as far as names tell (methods by self); goto, setjmp and longjmp in C++ and CUDA",
    recursion,
)
BOUNDED = Rule(
    2,
    "every loop has a bound",
    "loops whose condition is a constant, or over itertools.count, cycle and repeat; for(;;) and while (true)",
    bounded_loops,
)
SHORT = Rule(4, "no function is longer than a page", f"functions beyond {LONGEST} lines", short_functions)
