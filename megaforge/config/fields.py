"""How a configuration dataclass declares a flag: a dataclass field with its help, choices and aliases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megaforge.errors import UserError
from megaforge.registry import Registry

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LARGEST_INTEGER = 2**63 - 1
# Numbers reach tensors of fp32: what it cannot hold in full is a slip of the pen.
_SMALLEST, _LARGEST = 1.1754944e-38, 3.4028234e38


@dataclass(frozen=True)
class Bounds:
    """Which numbers a flag takes: from ``least`` to ``most``, beyond ``above`` and ``below`` where these are given, and
    in every case finite: integers of 64 bits, other numbers 0 or of a size that fp32 holds (1.2e-38 to 3.4e38)."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, value: float) -> None:
        """
        Raises:
            ValueError: with the range, as the end of a sentence.
        """
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError("expected a finite number")
            if abs(value) > _LARGEST:
                raise ValueError(f"too large: {self._range() or 'must be at most 3.4e38'}")
            if 0 < abs(value) < _SMALLEST:
                raise ValueError("too small: the smallest number above 0 is 1.2e-38")
        elif abs(value) > _LARGEST_INTEGER:
            raise ValueError(f"too large: {self._range() or f'must be at most {_LARGEST_INTEGER}'}")
        low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        high = (self.most is not None and value > self.most) or (self.below is not None and value >= self.below)
        if low or high:
            raise ValueError(self._range())

    def _range(self) -> str:
        """In words; nothing where there are no bounds of its own."""
        if self.above == 0 and self.most is None and self.below is None:
            return "must be positive"
        low = (
            f"at least {self.least}" if self.least is not None else "" if self.above is None else f"above {self.above}"
        )
        high = f"at most {self.most}" if self.most is not None else "" if self.below is None else f"below {self.below}"
        words = " and ".join(word for word in (low, high) if word)
        return f"must be {words}" if words else ""


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | Registry | None = None,
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    words: Mapping[str, Any] | None = None,
) -> Any:
    """A dataclass field that is also the flag ``--field-name`` and the YAML key ``field_name``.

    Args:
        default: value when neither the command line nor a file sets it.
        help: one line; what it does, in which unit.
        choices: the allowed values, when there are few; or a registry, to which ``--extensions`` may add.
        aliases: further flags for it, e.g. ``--tp``; as YAML keys they are written without dashes.
        metavar: what ``--help`` calls the value.
        least, most, above, below: which numbers it takes, see :class:`Bounds`.
        words: further values by the words that one writes for them, such as ``auto``; whatever the bounds.
    """
    metadata = {
        "help": help,
        "choices": choices if isinstance(choices, Registry) else tuple(choices) if choices else None,
        "aliases": tuple(aliases),
        "metavar": metavar,
        "bounds": Bounds(least, most, above=above, below=below),
        "words": dict(words or {}),
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(section: DataclassInstance) -> None:
    """Checks a section against what its fields declare: the bounds of every number, the registry of every name.

    Raises:
        UserError: naming the flag, its value and the range or the names.
    """
    for one in dataclasses.fields(section):
        value, choices = getattr(section, one.name), one.metadata["choices"]
        if isinstance(choices, Registry):
            for name in value if isinstance(value, tuple) else () if value is None else (value,):
                try:
                    choices.check(name)
                except UserError as error:
                    raise UserError(f"--{one.name.replace('_', '-')} {error}") from error
        if type(value) in (int, float) and value not in one.metadata["words"].values():
            try:
                one.metadata["bounds"].check(value)
            except ValueError as error:
                raise UserError(f"--{one.name.replace('_', '-')} {value}: {error}") from error


def divisors(number: int) -> list[int]:
    """The positive integers that divide ``number``, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def either(values: Iterable[object]) -> str:
    """What would work, as words: ``1, 2 or 4``."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
