"""``--data-schedule``: what a run reads when, as a file says it.

    base: corpus/standard            # a schedule to start from; what stands here replaces what stands there
    max_epochs: 4                    # passes over each source at most, unless it says its own
    sources:                         # what the datasets of --data-path are, where their .json does not say it
      web: {domain: web, quality: 0.7, difficulty: 0.3, date: 2024-05-01, max_epochs: 2}
    domains: {web: 60, code: 40}     # shares of the tokens; without them every source counts by its size
    stretches:                       # in this order; what one does not say is what stands above
      - {tokens: 2B, seq_length: 1024, difficulty: {most: 0.4}}
      - {tokens: 8B, temperature: 1.5}
      - {domains: {web: 30, code: 70}, quality: {least: 0.6}, half_life_days: 365}

The sources' names are the datasets' prefixes, or their last parts.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.schema import suggestion
from megaforge.errors import UserError

_FOLDER, _PREFIX = "data_schedules", "corpus/"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``; None: no bound there."""

    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in it."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        low = "" if self.least is None else f"at least {self.least:g}"
        return " and ".join(filter(None, (low, "" if self.most is None else f"at most {self.most:g}")))


@dataclass(frozen=True)
class Stretch:
    """Some samples in a row that are drawn alike.

    Attributes:
        samples, tokens: how long it is, one of them; None both: to the end of the run.
        seq_length: tokens of its samples; None: ``--seq-length``.
        domains: shares of the domains; empty: every source counts by its size, whatever its domain.
        temperature: t of shares proportional to size ** (1 / t) within a domain.
        buckets: which values of ``quality``, ``difficulty``, ``length`` (mean tokens of its documents) and ``date``
            (days) a source must have to be read.
        half_life_days: a source counts half for each so many days that it is older than the newest; None: all alike.
    """

    samples: int | None = None
    tokens: int | None = None
    seq_length: int | None = None
    domains: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    buckets: Mapping[str, Range] = field(default_factory=dict)
    half_life_days: float | None = None

    def samples_of(self, seq_length: int, unit: int) -> int | None:
        """How many samples it has: whole ``unit`` where it is counted in tokens."""
        if self.tokens is None:
            return self.samples
        return -(-self.tokens // ((self.seq_length or seq_length) * unit)) * unit


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source; None: nothing. ``date`` in days from 0001-01-01, ``length`` in tokens."""

    domain: str | None = None
    quality: float | None = None
    difficulty: float | None = None
    length: float | None = None
    date: float | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class DataSchedule:
    """A schedule.

    Attributes:
        name: what ``--data-schedule`` said.
        optional: data without its domains are read as ``--data-path`` has them, and what a domain without data would
            have goes to the others; otherwise either is an error.
        sources: by name.
    """

    name: str
    stretches: tuple[Stretch, ...] = (Stretch(),)
    sources: Mapping[str, SourceFacts] = field(default_factory=dict)
    max_epochs: float | None = None
    optional: bool = False

    def starts(self, seq_length: int, unit: int) -> list[int]:
        """The first sample of each stretch."""
        found = [0]
        for stretch in self.stretches[:-1]:
            found.append(found[-1] + (stretch.samples_of(seq_length, unit) or 0))
        return found

    def check_lengths(self, seq_length: int, divisor: int) -> None:
        """
        Raises:
            UserError: a stretch's ``seq_length`` is longer than ``--seq-length``, or cannot be split over the ranks.
        """
        for number, stretch in enumerate(self.stretches, 1):
            length = seq_length if stretch.seq_length is None else stretch.seq_length
            if length > seq_length:
                raise UserError(
                    f"--data-schedule {self.name}: stretch {number} has seq_length {length}, and --seq-length "
                    f"{seq_length} is the longest that the run is planned for; give --seq-length {length}"
                )
            if length % divisor:
                fitting = max(length // divisor, 1) * divisor
                raise UserError(
                    f"--data-schedule {self.name}: stretch {number} has seq_length {length}, which --cp and --sp "
                    f"cannot split: it must be a multiple of {divisor}, such as {fitting}"
                )


def read_schedule(name: str) -> DataSchedule:
    """The schedule ``--data-schedule NAME``: one of ours (``corpus/standard``), or a file ending in .yaml, and with
    ``+OTHER`` what another adds to it.

    Raises:
        UserError: there is none, or something in it cannot be.
    """
    first, *others = [name] if _is_file(name) and Path(name).is_file() else name.split("+")
    entries = _entries(first, None, ())
    for other in others:
        added = _entries(other if _is_file(other) else _PREFIX + other.removeprefix(_PREFIX), None, ())
        entries["add_domains"] = {**entries.get("add_domains", {}), **added.get("add_domains", {})}
    return _Reader(f"--data-schedule {name}").schedule(name, entries)


def schedule_names() -> list[str]:
    """The schedules of ours."""
    folder = resources.files("megaforge.config") / _FOLDER
    return sorted(_PREFIX + one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _entries(name: str, beside: Path | None, including: tuple[str, ...]) -> dict[str, Any]:
    """The mapping that a schedule's file holds, on top of its base."""
    shown = f"--data-schedule {name}"
    if _is_file(name):
        path = Path(beside or ".", name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    else:
        if name not in schedule_names():
            raise UserError(
                f"{shown}: no schedule has this name{suggestion(name, schedule_names())} (there are "
                f"{', '.join(schedule_names())}); a file of your own ends in .yaml"
            )
        path = None
        file = resources.files("megaforge.config") / _FOLDER / f"{name.removeprefix(_PREFIX)}.yaml"
        text = file.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{shown}: is not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{shown}: expected keys such as stretches: and domains:, found {_shown(content)}")
    base = content.pop("base", None)
    if base is None:
        return content
    identity = str(path or name)
    if not isinstance(base, str) or identity in including:
        raise UserError(f"{shown}: base: {_shown(base)} is not another schedule's name or file")
    return {**_entries(base, path.parent if path else None, (*including, identity)), **content}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Turns what YAML says into dataclasses; ``label`` begins its complaints."""

    def __init__(self, label: str) -> None:
        self._label = label

    def schedule(self, name: str, entries: Mapping[str, Any]) -> DataSchedule:
        own = {"sources": self._sources, "optional": _truth, "max_epochs": _positive, "add_domains": _shares}
        kept = {key: value for key, value in entries.items() if key != "stretches"}
        values = self._values("", kept, {**own, **_STRETCH})
        added = values.pop("add_domains", {})
        about = {key: values.pop(key) for key in ("sources", "optional", "max_epochs") if key in values}
        for key in ("samples", "tokens"):
            if key in values:
                raise self._complaint("", f"{key}: is a stretch's: write stretches: [{{{key}: {values[key]}}}, {{}}]")
        stretches = entries.get("stretches", [{}])
        if not isinstance(stretches, list) or not stretches:
            raise self._complaint("", f"stretches: expected a list, found {_shown(stretches)}")
        read = [self._stretch(number, one, values, added) for number, one in enumerate(stretches, 1)]
        for number, stretch in enumerate(read, 1):
            last, endless = number == len(read), stretch.samples is None and stretch.tokens is None
            if last and not endless:
                raise self._complaint(
                    f"stretch {number}", "the last one goes on to the end of the run: leave out samples and tokens"
                )
            if not last and endless:
                raise self._complaint(f"stretch {number}", "say how long it is: samples: 10000, or tokens: 2B")
        return DataSchedule(name, tuple(read), **about)

    def _stretch(self, number: int, entries: Any, above: Mapping[str, Any], added: Mapping[str, float]) -> Stretch:
        where = f"stretch {number}"
        own = self._values(where, entries, _STRETCH)
        if "samples" in own and "tokens" in own:
            raise self._complaint(where, "samples and tokens say the same thing twice; leave out one of them")
        values = {**above, **own}
        buckets = {name: values.pop(name) for name in _BUCKETS if name in values}
        domains = values.pop("domains", {})
        if domains:
            domains = {key: domains.get(key, 0.0) + added.get(key, 0.0) for key in [*domains, *added]}
        return Stretch(**values, domains=domains, buckets=buckets)

    def _sources(self, entries: Any) -> dict[str, SourceFacts]:
        if not isinstance(entries, dict):
            raise ValueError("expected names of datasets, each with what it is")
        return {
            str(name): SourceFacts(**self._values(f"source {name}", what, _SOURCE)) for name, what in entries.items()
        }

    def _values(self, where: str, entries: Any, readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
        if not isinstance(entries, dict):
            raise self._complaint(
                where, f"expected keys such as {', '.join(list(readers)[:3])}, found {_shown(entries)}"
            )
        found = {}
        for key, value in entries.items():
            if key not in readers:
                known = [*readers, *(("stretches", "base") if not where else ())]
                raise self._complaint(
                    where, f"unknown key '{key}'{suggestion(str(key), known)} (there are {', '.join(known)})"
                )
            try:
                found[key] = readers[key](value)
            except (ValueError, TypeError) as error:
                raise self._complaint(where, f"{key}: {error}, found {_shown(value)}") from error
        return found

    def _complaint(self, where: str, text: str) -> UserError:
        return UserError(f"{self._label}: {where + ': ' if where else ''}{text}")


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("expected a number")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError("expected a number above 0")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError("expected a number from 0 to 1")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("expected a whole number of at least 1")
    return value


def _count(value: Any) -> int:
    """2B, 1.5M or a whole number."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([KMBT]?)", str(value).upper())
    if match is None or int(float(match[1]) * _UNITS[match[2]]) < 1:
        raise ValueError("expected a number such as 250000 or 2B")
    return int(float(match[1]) * _UNITS[match[2]])


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("expected true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a word")
    return value


def _shares(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise ValueError("expected shares by name, such as {web: 60, code: 40}")
    found = {str(name): _number(share) for name, share in value.items()}
    if min(found.values()) < 0 or not sum(found.values()) > 0:
        raise ValueError("expected shares of at least 0 with a sum above 0")
    return found


def day(value: Any) -> float:
    """A date (2024, 2024-05 or 2024-05-01) as days from 0001-01-01.

    Raises:
        ValueError: with what was expected.
    """
    match = re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?(?:[T ].*)?", str(value))
    try:
        if match is not None:
            return float(datetime.date(int(match[1]), int(match[2] or 1), int(match[3] or 1)).toordinal())
    except ValueError:
        pass
    raise ValueError("expected a date such as 2024-05-01")


def _range(one: Callable[[Any], float]) -> Callable[[Any], Range]:
    def read(value: Any) -> Range:
        if not isinstance(value, dict) or not value or set(value) - {"least", "most"}:
            raise ValueError("expected {least: X}, {most: Y} or both")
        found = Range(**{key: one(bound) for key, bound in value.items()})
        if found.least is not None and found.most is not None and found.least > found.most:
            raise ValueError("nothing lies between these")
        return found

    return read


_BUCKETS: Mapping[str, Callable[[Any], Range]] = {
    "quality": _range(_share),
    "difficulty": _range(_share),
    "length": _range(_positive),
    "date": _range(day),
}
_STRETCH: Mapping[str, Callable[[Any], Any]] = {
    "samples": _whole,
    "tokens": _count,
    "seq_length": _whole,
    "domains": _shares,
    "temperature": _positive,
    "half_life_days": _positive,
    **_BUCKETS,
}
_SOURCE: Mapping[str, Callable[[Any], Any]] = {
    "domain": _text,
    "quality": _share,
    "difficulty": _share,
    "date": day,
    "max_epochs": _positive,
}


def facts_from(entries: Mapping[str, Any]) -> SourceFacts:
    """What a dataset's own description says of it; what cannot be read there is not known.

    Args:
        entries: the ``corpus`` of its ``.json``.
    """
    found = {}
    for key, read in _SOURCE.items():
        try:
            found[key] = read(entries[key])
        except (KeyError, ValueError, TypeError):
            continue
    return SourceFacts(**found)


def joined(over: SourceFacts, under: SourceFacts) -> SourceFacts:
    """``over``, and where it knows nothing ``under``."""
    own = {key: value for key, value in dataclasses.asdict(over).items() if value is not None}
    return dataclasses.replace(under, **own)
