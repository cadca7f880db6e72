"""A data schedule applied to the sources of a run: their weights in each stretch, and when a source has been read
often enough.

All of it depends on the schedule and the sources alone, never on how long the run is, so what comes later leaves the
past as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megaforge.config.data_schedule import DataSchedule, SourceFacts
from megaforge.config.schema import suggestion
from megaforge.data.sample_schedule import Caps, Plan, SampleSchedule, ScheduleChange
from megaforge.errors import UserError


@dataclass(frozen=True)
class Source:
    """A source as a schedule sees it: its dataset's prefix, its training tokens, and what is known of it."""

    name: str
    tokens: int
    facts: SourceFacts


@dataclass(frozen=True)
class Curriculum:
    """What a schedule makes of the sources.

    Attributes:
        changes: of length and weights, the first at sample 0.
        caps: how much each source may give.
        notices: what to say once.
    """

    changes: tuple[ScheduleChange, ...]
    caps: Caps
    notices: tuple[str, ...] = ()


def apply_schedule(
    schedule: DataSchedule, sources: Sequence[Source], *, seq_length: int, unit: int, weighted: bool = False
) -> Curriculum | None:
    """The curriculum; None where an optional schedule has nothing to go by, and ``--data-path`` holds as it is.

    Args:
        seq_length: ``--seq-length``.
        unit: samples that a stretch counted in tokens is a multiple of: a global batch.
        weighted: whether ``--data-path`` gives weights.

    Raises:
        UserError: a stretch weighs what no source has.
    """
    label = f"--data-schedule {schedule.name}"
    for name in schedule.sources:
        if not any(_is_named(source.name, name) for source in sources):
            known = [source.name for source in sources]
            raise UserError(
                f"{label}: sources has {name}, and --data-path has no such dataset{suggestion(name, known)} (it has "
                f"{', '.join(known)})"
            )
    if weighted and not schedule.optional:
        raise UserError(f"{label}: it says how sources are weighed: leave the weights out of --data-path")
    if schedule.optional and (weighted or not _has_domains(schedule, sources)):
        return None
    notices = list[str]()
    mixes = [_Mix(schedule, number, sources, notices) for number in range(1, len(schedule.stretches) + 1)]
    changes = tuple(
        ScheduleChange(start, stretch.seq_length or seq_length, mix.weights)
        for start, stretch, mix in zip(schedule.starts(seq_length, unit), schedule.stretches, mixes, strict=True)
    )
    domains = [source.facts.domain for source in sources]
    limits = [_limit(schedule, source) for source in sources]
    caps = Caps(tuple(limits), tuple(domains.index(domain) for domain in domains))
    return Curriculum(changes, caps, tuple(dict.fromkeys(notices)))


def plan_sources(
    schedule: SampleSchedule,
    sources: Sequence[Source],
    weights: Sequence[float],
    shares: Sequence[Sequence[float]],
    *,
    weighted: bool,
) -> tuple[Plan, list[str]]:
    """The plan of a run's samples, and what to say of it once.

    Args:
        weights, shares: of the sources, as :class:`megaforge.data.sample_schedule.Plan` takes them.
        weighted: whether ``--data-path`` gives these weights.

    Raises:
        UserError: as :func:`apply_schedule`.
    """
    asked = schedule.curriculum
    if asked is None:
        return Plan(schedule, weights, shares), []
    found = apply_schedule(asked, sources, seq_length=schedule.sequence_length, unit=schedule.unit, weighted=weighted)
    if found is None:
        why = "gives weights" if weighted else "has no dataset that says it is of one of these"
        note = f"--data-schedule {asked.name} weighs domains, and --data-path {why}: data are read as that has them"
        return Plan(schedule, weights, shares), [note]
    first, *others = found.changes
    length = first.sequence_length or schedule.sequence_length
    staged = replace(schedule, sequence_length=length, changes=tuple(others))
    return Plan(staged, first.weights or weights, shares, found.caps), list(found.notices)


def facts_of(schedule: DataSchedule | None, prefix: str) -> SourceFacts:
    """What a schedule's ``sources`` say of the dataset ``prefix``: by its whole prefix, or by its last part."""
    own = {} if schedule is None else schedule.sources
    name = next((name for name in own if name == prefix), None) or next((n for n in own if _is_named(prefix, n)), None)
    return SourceFacts() if name is None else own[name]


def _is_named(prefix: str, name: str) -> bool:
    return name in (prefix, prefix.rstrip("/").rpartition("/")[2])


def _has_domains(schedule: DataSchedule, sources: Sequence[Source]) -> bool:
    """Whether there is something to weigh by."""
    named = {source.facts.domain for source in sources}
    return all(not stretch.domains or named & set(stretch.domains) for stretch in schedule.stretches)


def _limit(schedule: DataSchedule, source: Source) -> int | None:
    epochs = schedule.max_epochs if source.facts.max_epochs is None else source.facts.max_epochs
    return None if epochs is None else int(epochs * source.tokens)


class _Mix:
    """The weights of one stretch: number ``number`` from 1."""

    def __init__(self, schedule: DataSchedule, number: int, sources: Sequence[Source], notices: list[str]) -> None:
        self._label = f"--data-schedule {schedule.name}: stretch {number}"
        self._optional, self._sources, self._notices = schedule.optional, sources, notices
        self._stretch = schedule.stretches[number - 1]
        self.weights = self._weights()

    def _weights(self) -> tuple[float, ...]:
        """Of each source, in their order."""
        stretch = self._stretch
        read = [place for place, source in enumerate(self._sources) if self._is_read(source)]
        if not read:
            raise UserError(f"{self._label}: no source has {self._asked()}; {self._values()}")
        weights = [0.0] * len(self._sources)
        domains: list[tuple[str | None, float]] = [*stretch.domains.items()] or [(None, 1.0)]
        for domain, share in domains:
            own = [place for place in read if domain is None or self._sources[place].facts.domain == domain]
            if not own and share:
                self._missing(str(domain), share)
                continue
            sizes = self._sizes(own)
            for place, size in zip(own, sizes, strict=True):
                weights[place] = share * size / math.fsum(sizes)
        if not sum(weights) > 0:
            raise UserError(f"{self._label}: none of its domains has a source: {', '.join(stretch.domains)}")
        unread = sorted({str(s.facts.domain) for s, weight in zip(self._sources, weights, strict=True) if not weight})
        if stretch.domains and (outside := [name for name in unread if name not in stretch.domains]):
            self._notices.append(
                f"{self._label}: it gives no share to {', '.join(outside)}, so none of it is read there"
            )
        return tuple(weights)

    def _is_read(self, source: Source) -> bool:
        """Whether its values lie in the stretch's buckets; a source that does not say its value is an error."""
        for name, bucket in self._stretch.buckets.items():
            value = getattr(source.facts, name)
            if value is None:
                raise UserError(
                    f"{self._label}: it asks for {name} {bucket}, and nobody says the {name} of {source.name}: add it "
                    f"to the file: sources: {{{source.name}: {{{name}: ...}}}}"
                )
            if not bucket.holds(value):
                return False
        return True

    def _sizes(self, places: Sequence[int]) -> list[float]:
        """The sources' sizes, by temperature and age; the largest is 1."""
        stretch, own = self._stretch, [self._sources[place] for place in places]
        dates = [source.facts.date for source in own]
        if stretch.half_life_days is not None and None in dates:
            undated = own[dates.index(None)].name
            raise UserError(
                f"{self._label}: half_life_days needs the date of every source, and nobody says that of {undated}: add "
                f"it to the file: sources: {{{undated}: {{date: 2024-05-01}}}}"
            )
        newest, largest = max((d for d in dates if d is not None), default=0.0), max((s.tokens for s in own), default=1)
        sizes = [(source.tokens / largest) ** (1 / stretch.temperature) for source in own]
        if stretch.half_life_days is not None:
            ages = [newest - (date or 0.0) for date in dates]
            sizes = [size * 2 ** (-age / stretch.half_life_days) for size, age in zip(sizes, ages, strict=True)]
        return sizes

    def _missing(self, domain: str, share: float) -> None:
        known = sorted({source.facts.domain for source in self._sources if source.facts.domain is not None})
        total = math.fsum(self._stretch.domains.values())
        if not self._optional:
            some = f"{domain} there lies in its buckets ({self._asked()}; {self._values()})"
            none = f"--data-path has it{suggestion(domain, known)} (there are {', '.join(known) or 'none'})"
            raise UserError(f"{self._label}: domain {domain}: no source of {some if domain in known else none}")
        self._notices.append(
            f"{self._label}: no dataset is of domain {domain}; its {share / total:.1%} go to the others"
        )

    def _asked(self) -> str:
        return ", ".join(f"{name} {bucket}" for name, bucket in self._stretch.buckets.items())

    def _values(self) -> str:
        """What the sources have of what is asked for."""
        names = list(self._stretch.buckets)
        shown = (f"{s.name} has " + ", ".join(f"{n} {getattr(s.facts, n):g}" for n in names) for s in self._sources)
        return "; ".join(shown)
