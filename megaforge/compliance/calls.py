"""Which function of the code calls which, as far as names tell: functions of a module by their name, imported ones,
methods by ``self`` and ``cls``."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from megaforge.compliance.code import Code, Function, Module

Key = tuple[str, str]  # a module's dotted name, a function's name in it


class Calls:
    """Resolves calls.

    Attributes:
        functions: all of the code, by module and name.
    """

    def __init__(self, code: Code) -> None:
        self.functions: dict[Key, tuple[Module, Function]] = {
            (module.dotted, function.name): (module, function) for module, function in code.functions
        }
        self._imported = {module.dotted: _imports(module) for module in code.modules}

    def target(self, module: Module, caller: Function | None, called: ast.expr) -> Key | None:
        """The function that an expression names; None: another one, or nobody knows."""
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            own = caller is not None and caller.owner and called.value.id in ("self", "cls")
            return self._known((module.dotted, f"{caller.owner}.{called.attr}")) if own and caller else None
        if not isinstance(called, ast.Name):
            return None
        for prefix in [] if caller is None else _scopes(caller):
            inner = self._known((module.dotted, f"{prefix}.{called.id}"))
            if inner is not None and (module.dotted, prefix) in self.functions:  # a class gives its methods no names
                return inner
        if caller is not None and called.id in _bound(caller):
            return None
        return self._known((module.dotted, called.id)) or self._known(
            self._imported[module.dotted].get(called.id, ("", ""))
        )

    def _known(self, key: Key) -> Key | None:
        return key if key in self.functions else None

    def graph(self) -> dict[Key, set[Key]]:
        """Whom each function calls."""
        found: dict[Key, set[Key]] = {}
        for key, (module, function) in self.functions.items():
            calls = (node for node in function.own_nodes() if isinstance(node, ast.Call))
            found[key] = {to for call in calls if (to := self.target(module, function, call.func)) is not None}
        return found


def _imports(module: Module) -> dict[str, Key]:
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in module.nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }


def _scopes(function: Function) -> list[str]:
    """Functions around the body of ``function`` whose names it sees, the innermost first."""
    parts = function.name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _bound(function: Function) -> set[str]:
    """Names that are parameters or variables of ``function``: no function of the module."""
    arguments = function.node.args
    names = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    stored = (node for node in function.own_nodes() if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return names | {node.id for node in stored}


def in_cycles(graph: Mapping[Key, set[Key]]) -> set[Key]:
    """What reaches itself."""
    left = {key: set(targets) & graph.keys() for key, targets in graph.items()}
    while ends := [key for key, targets in left.items() if not targets]:  # they reach nothing that is left
        for key in ends:
            del left[key]
        left = {key: targets & left.keys() for key, targets in left.items()}
    return {key for key in left if _reaches_itself(key, left)}


def _reaches_itself(key: Key, graph: Mapping[Key, set[Key]]) -> bool:
    seen: set[Key] = set()
    todo = list(graph[key])
    while todo:
        one = todo.pop()
        if one == key:
            return True
        if one not in seen:
            seen.add(one)
            todo += graph[one]
    return False
