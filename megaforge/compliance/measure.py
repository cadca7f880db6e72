"""What a rule measures, and how measures become a score and a level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaforge.compliance.code import Code


class Finding(NamedTuple):
    """Where something is not as a rule wants it: ``place`` is a file and a line."""

    place: str
    text: str


@dataclass(frozen=True)
class Measure:
    """How many of the units that a rule applies to comply with it.

    Attributes:
        units: what is counted, in the plural.
        note: what a reader has to know; of a rule that is not measured, why.
    """

    units: str
    applicable: int
    compliant: int
    findings: tuple[Finding, ...] = ()
    note: str = ""

    @property
    def share(self) -> float | None:
        """Compliant units of applicable ones; None: not measured."""
        return self.compliant / self.applicable if self.applicable else None


def measured(units: str, verdicts: Iterable[tuple[str, str | None]], note: str = "") -> Measure:
    """Of each unit its place and what is wrong with it, or None."""
    places = list(verdicts)
    findings = tuple(Finding(place, text) for place, text in places if text is not None)
    return Measure(units, len(places), len(places) - len(findings), findings, note)


def not_measured(units: str, why: str) -> Measure:
    """Of a rule that could not be looked at: it does not count."""
    return Measure(units, 0, 0, (), why)


@dataclass(frozen=True)
class Rule:
    """One of the ten.

    Attributes:
        number: Holzmann's.
        title: what the rule is in C.
        adapted: what is measured here.
        weight: in the score.
    """

    number: int
    title: str
    adapted: str
    measure: Callable[[Code], Measure]
    weight: int = 1


@dataclass(frozen=True)
class Gate:
    """What no level allows at all. ``find``: where it is."""

    name: str
    find: Callable[[Code], Sequence[Finding]]


class Part(NamedTuple):
    """What counts in a score: a share, of a rule on the code or of a control on a run."""

    name: str
    share: float
    weight: int = 1


class Level(NamedTuple):
    """What a level asks for: of the score, and of each part."""

    name: str
    score: float
    least: float


LEVELS = (Level("enhanced", 0.95, 0.90), Level("standard", 0.90, 0.80), Level("basic", 0.85, 0.0))


def score(parts: Sequence[Part]) -> float:
    """The weighted mean of the shares that were measured; 0 where nothing was.

    Raises:
        ValueError: a share is not between 0 and 1, or a weight not positive.
    """
    for part in parts:
        if not 0 <= part.share <= 1 or part.weight <= 0:
            raise ValueError(f"{part.name}: a share of {part.share} with the weight {part.weight}")
    weights = sum(part.weight for part in parts)
    return sum(part.share * part.weight for part in parts) / weights if weights else 0.0


def level(parts: Sequence[Part], gates_hold: bool) -> str | None:
    """The highest level that is reached; None: none is."""
    if not gates_hold or not parts:
        return None
    reached, least = score(parts), min(part.share for part in parts)
    return next((one.name for one in LEVELS if reached >= one.score and least >= one.least), None)


def reaches(reached: str | None, asked: str) -> bool:
    """Whether the level ``reached`` is ``asked``, or above it."""
    names = [one.name for one in LEVELS]
    return reached is not None and names.index(reached) <= names.index(asked)
