"""What a text says at its end."""

from __future__ import annotations

from decimal import Decimal

import pytest

from megaforge.tasks.answers import chosen_letter, last_box, last_number, plain_formula, result


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none", None),
        ("42", "42"),
        ("it costs $1,234.50 in all.", "1234.5"),
        ("18 dollars", "18"),
        ("-$5", "-5"),
        ("\N{MINUS SIGN}7", "-7"),
        ("a range of 3-5", "5"),
        ("(2)-9", "9"),
        ("x=-3.0", "-3"),
        ("0.1", "0.1"),
        ("42, so", "42"),
        ("1,000,000.", "1000000"),
        ("9" * 400, "9" * 400),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_result_stands_behind_the_last_mark() -> None:
    assert (
        result("#### 1 and then\n#### 42 \n") == "42" and result(" all of it ") == "all of it" and result("####") == ""
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("", None),
        ("none of these", None),
        ("B", "B"),
        (" (C) is", "C"),
        ("B. since A is wrong", "B"),
        ("I say that the answer is D, not A", "D"),
        ("answer: B and then Answer: (C)", "C"),
        ("A man chose B", "B"),
        ("It's C", "C"),
        ("Because", None),
    ],
)
def test_the_letter_that_is_chosen(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("no box", None),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{a}", "a"),
        (r"\boxed {x}", "x"),
        (r"\boxed{never closed", None),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_formulas_that_only_look_different_are_one() -> None:
    for one, other in [
        (r"\dfrac{1}{2}", r" \frac{1}{2}."),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("10,000", "10000"),
        (r"5 \text{ cm}", "5"),
        ("$x$", "x"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
    ]:
        assert plain_formula(one) == plain_formula(other)
    for one, other in [("(1,2)", "(12)"), (r"\text{a}b", "b"), ("1", "-1")]:
        assert plain_formula(one) != plain_formula(other)
