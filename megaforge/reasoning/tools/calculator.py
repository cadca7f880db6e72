"""The calculator in GSM8K's own form (Cobbe et al., arXiv 2110.14168): behind ``<<48/2=`` stands ``24>>``.

Exact: numbers are fractions of integers. Nothing is executed: the request is parsed, and of what Python knows only
sums, differences, products and quotients of decimal numbers are understood.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200  # characters of a request: no result has more than about as many digits
PLACES = 6  # of a result that does not end within so many: it is rounded, half to even
_ALLOWED = re.compile(r"[0-9.+\-*/() ]*")
_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Calculator:
    """See the module."""

    opens, closes = "<<", "="

    def __call__(self, request: str) -> str:
        """The result, or what is wrong with the request; and ``>>``."""
        try:
            return f"{_decimal(calculated(request))}>>"
        except ValueError as error:
            return f"error: {error}>>"


def calculated(request: str) -> Fraction:
    """The exact value of a sum, difference, product or quotient; ``1,200`` is 1200, and a dollar sign says nothing.

    Raises:
        ValueError: it is something else, or too long, or divides by zero.
    """
    if len(request) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    text = re.sub(r"(?<=\d),(?=\d{3})|\$", "", request).strip()
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python knows no 007
    if not _ALLOWED.fullmatch(text) or not text:
        raise ValueError("not numbers with + - * / ( )")
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not a calculation") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant):
        return Fraction(text[node.col_offset : node.end_col_offset])  # as it was written: a float would round it
    raise ValueError("not numbers with + - * / ( )")


def _decimal(value: Fraction) -> str:
    """As people write it: 24, 0.5, -33.333333."""
    scaled = round(value * 10**PLACES)
    whole, rest = divmod(abs(scaled), 10**PLACES)
    digits = f"{rest:0{PLACES}d}".rstrip("0")
    return f"{'-' if scaled < 0 else ''}{whole}{'.' if digits else ''}{digits}"


CALCULATOR = Calculator()
