"""One length, several flags: in iterations, in epochs or in samples. Which of them holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaforge.config.length_config import INTERVALS, LENGTHS
from megaforge.config.schema import settings
from megaforge.errors import UserError

# Settings that say one thing; of each row one holds.
_ROWS = [
    (key, *(f"length.{name}" for name in names), *(("optimizer.lr_warmup_fraction",) * key.endswith("lr_warmup_iters")))
    for key, names in {**LENGTHS, **INTERVALS}.items()
]


def choose_lengths(values: dict[str, Any], origins: dict[str, str]) -> None:
    """What was written nearer to the run holds: the command line before a file, a file before a preset. What it
    replaces becomes the default again, and its origin says so.

    Args:
        values, origins: of settings by key, changed in place.

    Raises:
        UserError: two of a row were written in one place.
    """
    for row in _ROWS:
        asked = {key: _rank(origins[key]) for key in row if _asks(key, values, origins[key])}
        if len(asked) < 2:
            continue
        nearest = [key for key in asked if asked[key] == max(asked.values())]
        if len(nearest) > 1:
            one, other = (f"{settings()[key].flag} {values[key]:g}" for key in nearest[:2])
            raise UserError(f"{one} and {other} exclude each other; leave out one of them")
        for key in asked:
            if key != nearest[0]:
                values[key] = settings()[key].default
                origins[key] = f"{settings()[nearest[0]].flag} ({origins[nearest[0]]}) holds in its place"


def _asks(key: str, values: Mapping[str, Any], origin: str) -> bool:
    """Whether somebody wants it. A file that lists every setting also lists those that are off or at their default."""
    if origin == "default" or values[key] is None:
        return False
    return _rank(origin) == _COMMAND_LINE or values[key] not in (0, settings()[key].default)


_PRESET, _FILE, _COMMAND_LINE = range(3)


def _rank(origin: str) -> int:
    return _PRESET if origin.startswith("preset ") else _COMMAND_LINE if origin.startswith("command line") else _FILE
