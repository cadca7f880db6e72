"""The calculator: exact, and an error is a text."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from megaforge.reasoning.tools.calculator import CALCULATOR, LONGEST, calculated


@pytest.mark.parametrize(
    ("request_", "written"),
    [
        ("48/2", "24>>"),
        (" 48 + 24 ", "72>>"),
        (".5*10", "5>>"),
        ("0.1+0.2", "0.3>>"),
        ("1/3", "0.333333>>"),
        ("-2/3", "-0.666667>>"),
        ("1/8", "0.125>>"),
        ("$1,200*2", "2400>>"),
        ("007+1", "8>>"),
        ("1.05*100.", "105>>"),
        ("2*-(3-5)", "4>>"),
        ("--1", "1>>"),
        ("1/10000000", "0>>"),
        ("-1/10000000", "0>>"),
        ("9" * 100 + "*1", "9" * 100 + ">>"),
        ("1/0", "error: division by zero>>"),
        ("1/(2-2)", "error: division by zero>>"),
        ("", "error: not numbers with + - * / ( )>>"),
        ("2**9999999", "error: not numbers with + - * / ( )>>"),
        ("7//2", "error: not numbers with + - * / ( )>>"),
        ("x+1", "error: not numbers with + - * / ( )>>"),
        ("__import__('os')", "error: not numbers with + - * / ( )>>"),
        ("1,2", "error: not numbers with + - * / ( )>>"),
        ("1e9", "error: not numbers with + - * / ( )>>"),
        ("(1", "error: not a calculation>>"),
        ("1 2", "error: not a calculation>>"),
        ("1..2", "error: not a calculation>>"),
        ("()", "error: not numbers with + - * / ( )>>"),
        ("1+" * 100 + "1", f"error: more than {LONGEST} characters>>"),
    ],
)
def test_what_it_writes(request_: str, written: str) -> None:
    assert CALCULATOR(request_) == written


@pytest.mark.parametrize(
    "request_", ["(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "(" * 100 + "1" + ")" * 100, "(" * 200]
)
def test_deep_requests_end(request_: str) -> None:
    assert CALCULATOR(request_).endswith(">>")


def test_it_is_exact() -> None:
    """Against sums of products, added up by hand, of made-up numbers that floats round."""
    draw = random.Random(1)
    for _ in range(200):
        terms = [
            [f"{draw.randint(0, 999)}.{draw.randint(0, 99):02d}" for _ in range(draw.randint(1, 3))]
            for _ in range(draw.randint(1, 4))
        ]
        signs = [draw.choice("+-") for _ in terms]
        request = "".join(sign + "*".join(term) for sign, term in zip(signs, terms, strict=True))
        products = [math.prod(map(Fraction, term)) for term in terms]
        exact = sum(product if sign == "+" else -product for sign, product in zip(signs, products, strict=True))
        assert calculated(request) == exact
