"""One length, several flags: in iterations, epochs, samples or tokens. Which of them holds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megaforge.config.length_config import INTERVALS, LENGTHS
from megaforge.config.schema import settings
from megaforge.errors import UserError

# Settings that say one thing; of each row one holds.
ROWS = [
    (key, *(f"length.{name}" for name in names), *(("optimizer.lr_warmup_fraction",) * key.endswith("lr_warmup_iters")))
    for key, names in {**LENGTHS, **INTERVALS}.items()
]


def choose_lengths(
    values: dict[str, Any], origins: dict[str, str], written: Collection[str], *, lists_all: bool
) -> None:
    """What is written here holds against what was written further from the run: the command line before a file, a file
    before its ``base``. What it replaces has its default again, and its origin says so.

    Args:
        values, origins: of settings by key, changed in place.
        written: the keys that were written here.
        lists_all: whether here may be a list of every setting, as ``--print-config`` writes it: of a row, those that
            are off or at their default then ask for nothing.

    Raises:
        UserError: two of a row were written here.
    """
    for row in ROWS:
        own = [key for key in row if key in written and values[key] is not None]
        if lists_all and len(own) > 1:
            own = [key for key in own if values[key] not in (0, settings()[key].default)]
        if len(own) > 1:
            one, other = (f"{settings()[key].flag} {values[key]:g}" for key in own[:2])
            raise UserError(f"{one} and {other} exclude each other; leave out one of them")
        for key in row:
            if own and key != own[0] and key in values and key not in written:
                del values[key]
                origins[key] = f"{settings()[own[0]].flag} ({origins[own[0]]}) holds in its place"
