"""Rules 5 and 7: what functions check, and whether types and results are heeded."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from megaforge.compliance.calls import Calls
from megaforge.compliance.code import Code, Function, Module
from megaforge.compliance.measure import Measure, Rule, measured

SMALL = 10  # lines of statements up to which a function needs no check
LEAST = 2
_CHECKING = re.compile(r"_*(check|require|refuse|raise|validate)(_|$)")  # functions that raise, by their names here


def checks(function: Function) -> int:
    """Assertions that may fail, exceptions raised, and calls of functions whose name says that they check."""
    return sum(_is_check(node) for node in function.own_nodes())


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not is_tautology(node.test)
    if isinstance(node, ast.Raise):
        return node.exc is not None
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return _CHECKING.match(name) is not None
    return False


def is_tautology(test: ast.expr) -> bool:
    """Whether an assertion holds whatever happens: of a constant, of a full tuple or text, of self, of a value that is
    compared with itself, or of anything beside such a one in an ``or``."""
    while isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        last = test.values[-1]
        if any(_always(value) for value in test.values[:-1]):
            return True
        test = last
    return _always(test)


def _always(test: ast.expr) -> bool:
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple | ast.List | ast.Set):
        return bool(test.elts)
    if isinstance(test, ast.JoinedStr):
        return bool(test.values)
    if isinstance(test, ast.Name):
        return test.id in ("self", "cls")
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return False
    left, right, op = test.left, test.comparators[0], test.ops[0]
    if isinstance(op, ast.IsNot) and isinstance(left, ast.Name) and left.id in ("self", "cls"):
        return isinstance(right, ast.Constant) and right.value is None
    same = ast.dump(left) == ast.dump(right) and not any(isinstance(node, ast.Call) for node in ast.walk(left))
    return same and isinstance(op, ast.Eq | ast.Is | ast.LtE | ast.GtE)


def assertion_density(code: Code) -> Measure:
    """Functions of more than :data:`SMALL` lines with :data:`LEAST` checks."""
    counts = [(module, function, checks(function)) for module, function in code.functions]
    whole = sum(count for *_, count in counts)
    mean = whole / max(1, len(counts))
    note = f"{whole} checks in {len(counts)} functions, {mean:.2f} a function; C++ is not looked at"

    def verdicts() -> Iterator[tuple[str, str | None]]:
        for module, function, count in counts:
            if function.body_lines > SMALL:
                few = f"{function.name}: {count} checks in {function.body_lines} lines"
                yield f"{module.path}:{function.node.lineno}", few if count < LEAST else None

    return measured(f"functions of more than {SMALL} lines", verdicts(), note)


def heeded(code: Code) -> Measure:
    """Functions whose parameters and result have types, and that drop no result of a function that gives one."""
    calls = Calls(code)

    def problem(module: Module, function: Function) -> str | None:
        if missing := _untyped(function):
            return f"{function.name}: no type of {', '.join(missing)}"
        for node in function.own_nodes():
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                target = calls.target(module, function, node.value.func)
                if target is not None and _gives(calls.functions[target][1]):
                    return f"{function.name} drops what {target[1]} gives (line {node.lineno})"
        return None

    return measured(
        "functions",
        (
            (f"{module.path}:{function.node.lineno}", problem(module, function))
            for module, function in code.functions
            if not _is_kernel(function)
        ),
        "mypy sees that values are of these types; C++ has them by itself, and Triton's kernels get them as they start",
    )


def _is_kernel(function: Function) -> bool:
    """Whether Triton compiles it, for the types of the values that it is started with."""
    return any("triton" in ast.unparse(one) for one in function.node.decorator_list)


def _untyped(function: Function) -> list[str]:
    taken = function.node.args
    named = [*taken.posonlyargs, *taken.args]
    decorators = {ast.unparse(one) for one in function.node.decorator_list}
    if function.owner and "staticmethod" not in decorators:
        named = named[1:]
    named += [*taken.kwonlyargs, *filter(None, (taken.vararg, taken.kwarg))]
    missing = [one.arg for one in named if one.annotation is None]
    return missing + ["its result"] * (function.node.returns is None)


def _gives(function: Function) -> bool:
    """Whether it has a result that a caller has to look at: what a check has to say it raises."""
    if _CHECKING.match(function.node.name):
        return False
    kind = function.node.returns
    name = "None" if kind is None else ast.unparse(kind).strip("'\"")
    variable = name.isupper() and len(name) <= 2  # T: what a function of the caller's gives
    return not variable and name not in ("None", "NoReturn", "Never")


DENSITY = Rule(
    5,
    "two assertions a function at least",
    f"functions with fewer than {LEAST} checks: assertions that can fail, raised exceptions, calls of check_..., "
    "require..., refuse..., raise_..., validate",
    assertion_density,
    weight=2,
)
HEEDED = Rule(
    7,
    "parameters and results are checked",
    "functions with a parameter or a result without a type (Triton's kernels left out), or that drop the result of a "
    "function of this code without saying so, as _ = f() (of those named after checking, which raise, left out)",
    heeded,
    weight=2,
)
