"""How a configuration dataclass declares a flag: a dataclass field with its help, choices and aliases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from megaforge.errors import UserError


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is also the flag ``--field-name`` and the YAML key ``field_name``.

    Args:
        default: value when neither the command line nor a file sets it.
        help: one line; what it does, in which unit.
        choices: the allowed values, when there are few.
        aliases: further flags for it, e.g. ``--tp``; as YAML keys they are written without dashes.
        metavar: what ``--help`` calls the value.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices else None,
        "aliases": tuple(aliases),
        "metavar": metavar,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require_at_least(section: object, minimum: float, *names: str) -> None:
    """Checks that each named field of ``section`` is None or not below ``minimum``.

    Raises:
        UserError: naming the flag and its value.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")


def require_positive(section: object, *names: str) -> None:
    """Checks that each named field of ``section`` is above 0.

    Raises:
        UserError: naming the flag and its value.
    """
    for name in names:
        if getattr(section, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(section, name)}: must be positive")


def divisors(number: int) -> list[int]:
    """The positive integers that divide ``number``, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def either(values: Iterable[object]) -> str:
    """What would work, as words: ``1, 2 or 4``."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
