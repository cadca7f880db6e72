"""Rule 6: data at the smallest scope. Of Python that is about names of modules: whether functions change them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from megaforge.compliance.code import Code, Module
from megaforge.compliance.measure import Measure, Rule, measured

_CHANGING = frozenset(
    ("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse", "update", "setdefault", "popitem")
    + ("add", "discard", "appendleft", "popleft")
)


def small_scopes(code: Code) -> Measure:
    """Names of modules that no function binds anew or changes."""

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for module in code.modules:
            names = _names(module)
            changed = _changed(module, names)
            for name, line in names.items():
                yield f"{module.path}:{line}", changed.get(name)

    return measured("names of modules", verdicts(), "C++ is not looked at")


def _names(module: Module) -> dict[str, int]:
    """Variables of the module itself, with their line."""
    found: dict[str, int] = {}
    for statement in module.tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign | ast.AugAssign):
            targets = [statement.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.setdefault(node.id, node.lineno)
    return found


def _changed(module: Module, names: dict[str, int]) -> dict[str, str]:
    """What functions do to them."""
    found: dict[str, str] = {}
    for function in module.functions:
        nodes = list(function.own_nodes())
        outside = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        taken = function.node.args
        own = {one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} - outside
        for name in outside & names.keys():
            found[name] = f"{function.name} binds {name} anew"
        for node in nodes:
            name = _target(node)
            if name in names and name not in own:
                found.setdefault(name, f"{function.name} changes {name}")
    return found


def _target(node: ast.AST) -> str:
    """The name of what a node changes in place, or nothing."""
    changed: ast.AST | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
        changed = node.func.value
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        changed = node.value
    return changed.id if isinstance(changed, ast.Name) else ""


SCOPE = Rule(
    6,
    "data live at the smallest scope",
    "variables of modules that functions bind anew (global) or change in place",
    small_scopes,
)
