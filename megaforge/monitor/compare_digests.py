"""Where two runs part, by the digests that they wrote (``--digest-interval``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.errors import UserError
from megaforge.json_text import parse_json

FILE = "digests.jsonl"
PARTS = ("activations", "gradients", "weights")  # in the order in which a step makes them


@dataclass(frozen=True)
class Parting:
    """The first thing that differs.

    Attributes:
        part: of :data:`PARTS`.
        name: of the layer or parameter.
        relative: how far apart the norms are; 0 where only bits differ.
        others: how much of the same part of this step differs too.
    """

    iteration: int
    part: str
    name: str
    relative: float
    others: int


def read_digests(run: str | Path) -> dict[int, dict[str, Any]]:
    """The records of a run's directory, or of a file of them, by iteration; of one that was trained again, the last.

    Raises:
        UserError: there are none, or a line is not one of them.
    """
    file = Path(run) / FILE if Path(run).is_dir() else Path(run)
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{file}: it cannot be read ({error.strerror}); a run with --digest-interval N writes one in its --save"
        ) from error
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            known = {part: {str(k): v for k, v in record[part].items()} for part in PARTS}
            found[int(record["iteration"])] = known
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            if number == len(lines):
                continue  # a run that was killed while it wrote
            raise UserError(f"{file}: line {number} is not a record of digests") from None
    if not found:
        raise UserError(f"{file}: holds no records")
    return found


def first_difference(
    one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], rtol: float = 0.0
) -> Parting | None:
    """The first step, and the first thing in it, by which two runs differ.

    Args:
        rtol: norms may be apart by this share of the greater; 0: every bit counts.

    Raises:
        UserError: they have no step in common, or are of models with other parameters.
    """
    common = sorted(one.keys() & other.keys())
    if not common:
        raise UserError(
            f"no iteration is in both: {_span(one)} and {_span(other)}; give both runs one --digest-interval"
        )
    for iteration in common:
        for part in PARTS:
            differing = list(_differing(one[iteration][part], other[iteration][part], part, rtol))
            if differing:
                name, relative = differing[0]
                return Parting(iteration, part, name, relative, len(differing) - 1)
    return None


def _span(found: dict[int, dict[str, Any]]) -> str:
    return f"{min(found)} to {max(found)}"


def _differing(one: dict[str, Any], other: dict[str, Any], part: str, rtol: float) -> Iterator[tuple[str, float]]:
    if one.keys() != other.keys():
        name = min(one.keys() ^ other.keys())
        raise UserError(f"{name}: only one of the runs has {part} of it; these are runs of different models")
    for name in sorted(one, key=_natural, reverse=part == "gradients"):  # the last layers' come first
        (bits, norm), (other_bits, other_norm) = one[name], other[name]
        same = bits == other_bits and (norm == other_norm or (math.isnan(norm) and math.isnan(other_norm)))
        apart = abs(norm - other_norm) / (max(abs(norm), abs(other_norm)) or 1.0)
        if not same and not (rtol and apart <= rtol):
            yield name, apart


def _natural(name: str) -> list[tuple[int, str]]:
    """Layers by number: 2 before 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
