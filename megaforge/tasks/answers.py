"""What a text says at its end: the number, the letter, the formula in a box; as it is written and as it is compared."""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"  # before the result of a worked answer (GSM8K: Cobbe et al., arXiv 2110.14168)
_NUMBER = re.compile(r"(?:(?<![\w)])-[$€£]?)?\d[\d,]*(?:\.\d+)?")
_SAYS = re.compile(r"(?i:answer)\s*(?:is|:)?\s*:?\s*\(?([A-Z])(?![A-Za-z])")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_EMPTY = re.compile(r"\\left|\\right|\\[!,;: ]|\\text\s*\{[^{}]*\}\s*$|\$|\s")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, whatever its currency, unit or commas; None: it has none.

    A minus counts where no word, digit or bracket is before it: 5-3 has the numbers 5 and 3.
    """
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(re.sub(r"[,$€£]", "", found[-1])) if found else None


def result(text: str) -> str:
    """What stands behind the last :data:`MARK`; without one the whole text."""
    return text.rpartition(MARK)[2].strip()


def chosen_letter(text: str) -> str | None:
    """The letter that a text chooses: the one that it begins with, else the last that it calls its answer, else the
    last that stands alone; None: there is none."""
    text = text.strip()
    if begun := re.match(r"\(?([A-Z])(?:[).:,]|\s*$)", text):
        return begun[1]
    found = _SAYS.findall(text) or re.findall(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])", text)
    return found[-1] if found else None


def last_box(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}``, brackets within it matched (MATH: Hendrycks et al., arXiv 2103.03874).

    None: there is no box, or it is not closed.
    """
    begun = list(_BOX.finditer(text))
    if not begun:
        return None
    first, depth = begun[-1].end(), 1
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place].strip()
    return None


def plain_formula(text: str) -> str:
    r"""A formula without what only changes how it looks: spaces, ``$``, ``\left``, a unit at its end, a full stop."""
    text = text.strip().rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")
    text = _EMPTY.sub("", text).replace("^{\\circ}", "").replace("^\\circ", "").replace("\\%", "").replace("%", "")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def same_formula(one: str, other: str) -> bool:
    """Whether two formulas are the same but for looks, or the same number."""
    one, other = plain_formula(one), plain_formula(other)
    return one == other or _number(one) == _number(other) is not None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
