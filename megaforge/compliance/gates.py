"""What no level allows: a warning, an exception that vanishes, code made of text."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from megaforge.compliance import tools
from megaforge.compliance.code import Code
from megaforge.compliance.measure import Finding, Gate

_ANY = frozenset({"Exception", "BaseException"})


def swallowed(code: Code) -> list[Finding]:
    """Handlers of any exception at all that do nothing with it."""
    return [
        Finding(f"{module.path}:{node.lineno}", "any exception, and nothing is done about it")
        for module in code.modules
        for node in module.nodes
        if isinstance(node, ast.ExceptHandler | ast.Call) and _swallows(node)
    ]


def _swallows(node: ast.ExceptHandler | ast.Call) -> bool:
    if isinstance(node, ast.ExceptHandler):
        silent = all(isinstance(one, ast.Pass | ast.Continue) or _is_constant(one) for one in node.body)
        return silent and (node.type is None or not _ANY.isdisjoint(_names(node.type)))
    called = ast.unparse(node.func) in ("suppress", "contextlib.suppress")
    return called and any(not _ANY.isdisjoint(_names(one)) for one in node.args)


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


def evaluated(code: Code) -> list[Finding]:
    """Calls of ``eval`` and ``exec``."""
    return list(_evaluated(code))


def _evaluated(code: Code) -> Iterator[Finding]:
    for module in code.modules:
        for node in module.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield Finding(f"{module.path}:{node.lineno}", f"a call of {node.func.id}")


NO_WARNING = Gate("no warning of ruff or mypy", lambda code: tools.warnings(code)[0])
NONE_VANISHES = Gate("no exception vanishes", swallowed)
NO_TEXT_RUNS = Gate("no eval or exec of text", evaluated)
