"""How large a file, a function and a constructor may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
FILE, FUNCTION, CONSTRUCTOR = 500, 60, 8  # lines, lines, arguments beside self
# Those beyond a limit today. The list may only become shorter.
BEYOND: set[str] = set()


def beyond(source: str) -> Iterator[str]:
    """What is too large in a module."""
    if (lines := source.count("\n")) > FILE:
        yield f"has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION:
                yield f"{node.name} has {lines} lines"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    taken = method.args.posonlyargs + method.args.args + method.args.kwonlyargs
                    if len(taken) - 1 > CONSTRUCTOR:
                        yield f"{node.name} takes {len(taken) - 1} arguments"


def test_nothing_is_larger_than_one_reads_at_once() -> None:
    folders = [REPO / name for name in ("megaforge", "tests", "tools", "examples")]
    files = [*REPO.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert len(files) > 300
    found = {f"{file.relative_to(REPO)}: {what}" for file in files for what in beyond(file.read_text("utf-8"))}
    assert found - BEYOND == set(), "beyond a limit"
    assert BEYOND - found == set(), "within the limits now: take these off the list"


def test_each_limit_is_seen() -> None:
    class_of = "class A:\n    def __init__(self, {}): ...\n".format
    assert list(beyond(class_of("a, b, c, d, e, f, g, *, h"))) == []
    assert list(beyond(class_of("a, b, c, d, /, e, f, g, *, h, i"))) == ["A takes 9 arguments"]
    body = "def f():\n" + "    pass\n" * FUNCTION
    assert list(beyond(body)) == ["f has 61 lines"] and list(beyond(body.removesuffix("    pass\n"))) == []
    assert list(beyond("\n" * 501)) == ["has 501 lines"] and list(beyond("\n" * 500)) == []
