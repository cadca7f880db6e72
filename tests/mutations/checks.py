"""Checks of the program taken out at random: a test of the module that they are in has to fail."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from functools import cache

from tests.mutations.table import ROOT, Mutation
from tests.test_limits import COVERED


def sampled(count: int, seed: int) -> Iterator[tuple[int, Mutation]]:
    """``count`` checks, the same ones for a seed, each with the line that it begins at."""
    yield from random.Random(seed).sample(_all_checks(), min(count, len(_all_checks())))


@cache
def _all_checks() -> tuple[tuple[int, Mutation], ...]:
    files = sorted((ROOT / "megaforge").rglob("*.py"))
    return tuple(one for path in files for one in _checks(path.read_text("utf-8"), path))


def _checks(source: str, path: object) -> Iterator[tuple[int, Mutation]]:
    file = str(path).removeprefix(f"{ROOT}/megaforge/")
    test = named_test(file)
    for node in ast.walk(ast.parse(source)):
        if test is None or not isinstance(node, ast.Raise | ast.Assert):
            continue
        if isinstance(node, ast.Raise) and node.exc is None:
            continue
        code = ast.get_source_segment(source, node) or ""
        yield node.lineno, Mutation(file, code, "pass", test)


def named_test(file: str) -> str | None:
    """The test of a module: of its name, or the one that covers it, or the first one that imports it; None: none."""
    own = f"tests/{re.sub('[^/]+$', lambda name: f'test_{name[0]}', file)}"
    if (ROOT / own).is_file():
        return own
    covered = next((test for row, test in COVERED.items() if file.startswith(row)), None)
    if covered is not None:
        return f"tests/{covered}"
    dotted = ".".join(("megaforge", *file.removesuffix(".py").split("/"))).removesuffix(".__init__")
    importing = re.compile(rf"^ *from {re.escape(dotted)} import ", re.MULTILINE)
    return next((file for file, text in _tests() if importing.search(text)), None)


@cache
def _tests() -> tuple[tuple[str, str], ...]:
    """Every file of tests and what it says."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return tuple((str(one.relative_to(ROOT)), one.read_text("utf-8")) for one in files)
