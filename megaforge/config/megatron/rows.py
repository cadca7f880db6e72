"""What a row of the tables says of one flag of Megatron-LM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

ANY = -1  # as many values as there are words up to the next flag
LEAVE_OUT = "leave it out"
NOT_AVAILABLE = "not available here; leave it out, and the model or the run is another one than there"


@dataclass(frozen=True)
class Outcome:
    """What becomes of a flag.

    Attributes:
        words: our words in its place, where ``{}`` stands for its value; none: nothing, as it is so without the flag
            or changes speed only.
        note: what is told, as the end of a sentence that begins with the flag and its value.
        refused: why it cannot be followed and what to write instead, as the end of such a sentence.
    """

    words: tuple[str, ...] = ()
    note: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """One flag, or all whose names begin alike (``fsdp-*``).

    Attributes:
        flag: the name without its dashes.
        arity: values that it takes: 0, 1 or :data:`ANY`.
        outcome: what becomes of it.
        values: the values that have another outcome, each in lower case.
    """

    flag: str
    arity: int
    outcome: Outcome
    values: Mapping[str, Outcome] = field(default_factory=dict)


NOOP = Outcome()


def becomes(words: str, note: str = "") -> Outcome:
    return Outcome(tuple(words.split()), note)


def refuse(text: str) -> Outcome:
    return Outcome(refused=text)


def same(arity: int, outcome: Outcome, names: str) -> Iterator[Row]:
    """Rows of flags that have one outcome; ``names`` has them in words."""
    return (Row(name, arity, outcome) for name in names.split())


def noop(arity: int, names: str) -> Iterator[Row]:
    return same(arity, NOOP, names)


def alias(arity: int, spellings: Mapping[str, str]) -> Iterator[Row]:
    """Rows of flags with another name here."""
    return (Row(name, arity, becomes(words)) for name, words in spellings.items())


def advice(arity: int, text: str, names: str) -> Iterator[Row]:
    """Rows of flags that are refused, with what to write instead."""
    return same(arity, refuse(text), names)


def only(flag: str, values: str, otherwise: str, arity: int = 1) -> Row:
    """A flag whose ``values`` (words) say what is so here; any other is refused."""
    return Row(flag, arity, refuse(otherwise), dict.fromkeys(values.split(), NOOP))
