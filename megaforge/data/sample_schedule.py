"""What a run reads when: the seed, the sequence lengths and the weights, over global sample numbers.

A schedule never mentions how long the run is, how many ranks it has or how they batch, so none of these can change
which sample is the k-th. A change at a later sample leaves everything before it as it was.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megaforge.config.config import Config
from megaforge.config.data_schedule import DataSchedule, read_schedule
from megaforge.data.blend import Blend
from megaforge.data.data_source import DataSource
from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError

STATE_VERSION = 1


@dataclass(frozen=True)
class ScheduleChange:
    """From global sample ``start_sample`` on: another sequence length, other source weights, or both (None keeps)."""

    start_sample: int
    sequence_length: int | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Caps:
    """How much the sources may give.

    Attributes:
        tokens: of each source; None: without end.
        groups: of each source: those of one group are given the share of one of them that has given all.
    """

    tokens: tuple[int | None, ...]
    groups: tuple[int, ...]

    def left(self, mix: Sequence[float], done: Collection[int]) -> tuple[float, ...]:
        """The weights ``mix`` without the sources ``done``."""
        left = [0.0 if source in done else weight for source, weight in enumerate(mix)]
        for group in {self.groups[source] for source in done}:
            own = [source for source, other in enumerate(self.groups) if other == group]
            rest = math.fsum(left[source] for source in own)
            if rest:
                scale = math.fsum(mix[source] for source in own) / rest
                left = [weight * scale if source in own else weight for source, weight in enumerate(left)]
        return tuple(left)


@dataclass(frozen=True)
class SampleSchedule:
    """The seed of the order, the sequence length in tokens, and later changes in ascending ``start_sample``.

    ``lanes`` is how many token streams each source is read from in turn, so that consecutive samples come from
    different documents even where documents are many windows long. ``curriculum`` is a schedule that needs to know the
    sources, and a multiple of ``unit`` is where its stretches that are counted in tokens end. With ``round_size``
    documents are read in file order, shuffled within rounds of so many.
    """

    seed: int
    sequence_length: int
    changes: tuple[ScheduleChange, ...] = ()
    lanes: int = 1
    curriculum: DataSchedule | None = None
    unit: int = 1
    round_size: int | None = None

    @staticmethod
    def of(config: Config) -> SampleSchedule:
        """What the flags ask for.

        Raises:
            UserError: a ``--data-schedule`` that cannot be.
        """
        name, length = config.data.data_schedule, config.data.seq_length
        curriculum = None if name is None else read_schedule(name)
        if curriculum is not None:
            curriculum.check_lengths(length, config.parallel.seq_len_divisor)
        unit = config.training.full_batch_size or 1
        in_rounds = config.data.data_order == "streamed" or config.data.streams
        return SampleSchedule(
            config.training.seed,
            length,
            lanes=1 if in_rounds else config.data.data_lanes,
            curriculum=curriculum,
            unit=unit,
            round_size=config.data.stream_round if in_rounds else None,
        )


@dataclass(frozen=True)
class Stage:
    """A stretch of samples of one length and mix.

    Attributes:
        start, sequence_length: its first sample, and the tokens of each.
        weights: of the sources; they add up to 1.
        blend: the order of the token streams, of which a source may have several.
        cursors: each stream's token cursor where the stage begins.
    """

    start: int
    sequence_length: int
    weights: tuple[float, ...]
    blend: Blend
    cursors: tuple[int, ...]

    def cursors_after(self, samples: int) -> tuple[int, ...]:
        """Each stream's token cursor when ``samples`` of this stage have been read."""
        counts = self.blend.counts(samples)
        return tuple(c + n * self.sequence_length for c, n in zip(self.cursors, counts, strict=True))


class Plan:
    """A schedule applied to the sources' ``weights``: finds the stage, stream and token cursor of any sample.

    ``shares`` gives, for each source, the shares of its tokens that its streams hold; one stream each without it.

    Attributes:
        end: the sample before which every source has given all that its cap allows; None: samples have no end.

    Raises:
        UserError: a sequence length or a weight that cannot be, or changes out of order.
    """

    def __init__(
        self,
        schedule: SampleSchedule,
        weights: Sequence[float],
        shares: Sequence[Sequence[float]] | None = None,
        caps: Caps | None = None,
    ) -> None:
        self.seed, self.lanes, self.round_size = schedule.seed, schedule.lanes, schedule.round_size
        self._shares = [[1.0]] * len(weights) if shares is None else shares
        self._caps = Caps((None,) * len(weights), (0,) * len(weights)) if caps is None else caps
        self._done: set[int] = set()
        self.stages: list[Stage] = []
        self.end: int | None = None
        cursors = (0,) * sum(map(len, self._shares))
        stretches = list(_stretches(schedule, tuple(weights)))
        for (start, length, mix), (stop, _, _) in zip(stretches, stretches[1:], strict=False):
            cursors = self._lay(start, stop, length, mix, cursors)
        start, length, mix = stretches[-1]
        _ = self._lay(start, None, length, mix, cursors)
        self.starts = [stage.start for stage in self.stages]

    def _lay(
        self, start: int, stop: int | None, length: int, mix: tuple[float, ...], cursors: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Adds the stages of a stretch: another begins where a source reaches its cap. Returns the streams' cursors at
        ``stop``; None: the stretch goes on as long as there is something to read."""
        while True:
            live = self._caps.left(mix, self._done)
            total = math.fsum(live)
            if not total and stop is not None:
                raise UserError(
                    f"--data-schedule: after {start:,} samples what a stretch reads has been read as often as "
                    f"max_epochs allows, and it goes on to sample {stop:,}; make it shorter, or raise max_epochs"
                )
            if not total:
                self.end = start
                return cursors
            streams = [weight * share for weight, own in zip(live, self._shares, strict=True) for share in own]
            stage = Stage(start, length, tuple(weight / total for weight in live), Blend(streams), cursors)
            reached = {source: self._reaches(stage, source) for source in range(len(live)) if live[source]}
            first = min((samples for samples in reached.values() if samples is not None), default=None)
            if first != 0:
                self.stages.append(stage)
            if first is None or (stop is not None and start + first >= stop):
                return cursors if stop is None else stage.cursors_after(stop - start)
            self._done |= {source for source, samples in reached.items() if samples == first}
            start, cursors = start + first, stage.cursors_after(first)

    def _reaches(self, stage: Stage, source: int) -> int | None:
        """After how many samples of ``stage`` one more would be beyond the cap of ``source``; None: never."""
        cap = self._caps.tokens[source]
        if cap is None:
            return None
        first = sum(map(len, self._shares[:source]))
        own = slice(first, first + len(self._shares[source]))
        allowed = max(0, (cap - sum(stage.cursors[own])) // stage.sequence_length)
        # Its share of any first samples is exact to about one sample a stream.
        around = allowed / stage.weights[source]
        margin = (len(stage.cursors) + 2) * (1 / stage.weights[source] + 1) + around * 1e-9
        candidates = range(max(0, math.floor(around - margin)), math.ceil(around + margin) + 1)
        return candidates[bisect_left(candidates, allowed, key=lambda n: sum(stage.blend.counts(n)[own]))]

    def stage_at(self, sample: int) -> Stage:
        """The stage that ``sample`` (>= 0) belongs to.

        Raises:
            UserError: it comes after the end.
        """
        if sample < 0:
            raise IndexError(f"sample {sample}: samples count from 0")
        if self.end is not None and sample >= self.end:
            raise UserError(
                f"--data-schedule: every source has been read as often as max_epochs allows after {self.end:,} "
                f"samples, and sample {sample:,} was asked for; make the run shorter, raise max_epochs, or add data"
            )
        return self.stages[0] if len(self.stages) == 1 else self.stages[bisect_right(self.starts, sample) - 1]

    def tokens_before(self, sample: int) -> int:
        """Tokens (labels) in samples [0, sample)."""
        stops = [*self.starts[1:], math.inf]
        return sum(
            int(max(0, min(stop, sample) - stage.start)) * stage.sequence_length
            for stage, stop in zip(self.stages, stops, strict=True)
        )

    @property
    def length_starts(self) -> list[int]:
        """The samples at which the sequence length changes, from 0 on."""
        before = [None, *(stage.sequence_length for stage in self.stages)]
        return [s.start for s, other in zip(self.stages, before, strict=False) if s.sequence_length != other] or [0]

    def describe(self, consumed_samples: int) -> list[dict[str, Any]]:
        """The stages that ``consumed_samples`` has entered, for the state; later ones are free to change."""
        entered = [stage for stage in self.stages if stage.start < max(consumed_samples, 1)]
        return [
            {"start_sample": s.start, "sequence_length": s.sequence_length, "weights": list(s.weights)} for s in entered
        ]


class ScheduledSource(DataSource, Protocol):
    """A source whose samples follow ``plan``."""

    plan: Plan

    @property
    def stage_starts(self) -> list[int]:
        """The samples at which the sequence length changes, from 0 on."""
        return self.plan.length_starts

    @property
    def end(self) -> int | None:
        """How many samples there are; None: without end."""
        return self.plan.end

    def sequence_length(self, k: int) -> int:
        """S of sample ``k``."""
        return self.plan.stage_at(k).sequence_length

    def tokens_before(self, samples: int) -> int:
        """Labels in samples [0, samples)."""
        return self.plan.tokens_before(samples)

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuses to continue a run whose past this data and schedule would not have produced.

        Raises:
            UserError: names the field that differs.
        """
        check_state(self.state(int(saved.get("consumed_samples", 0))), saved)


def _stretches(schedule: SampleSchedule, weights: tuple[float, ...]) -> Iterator[tuple[int, int, tuple[float, ...]]]:
    """(first sample, sequence length, weights) of what follows each other."""
    length, mix, before = _checked_length(schedule.sequence_length), _checked_mix(weights, len(weights)), 0
    yield 0, length, mix
    for change in schedule.changes:
        if change.start_sample <= before:
            raise UserError(
                f"the sample schedule changes at sample {change.start_sample}, which does not come after "
                f"{before}; list its changes in ascending order, from sample 1 on"
            )
        length = length if change.sequence_length is None else _checked_length(change.sequence_length)
        mix = mix if change.weights is None else _checked_mix(change.weights, len(mix))
        yield change.start_sample, length, mix
        before = change.start_sample


def _checked_length(length: int) -> int:
    if length < 1:
        raise UserError(f"--seq-length {length}: a sequence needs at least one token")
    return length


def _checked_mix(weights: tuple[float, ...], sources: int) -> tuple[float, ...]:
    if len(weights) != sources or not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
        raise UserError(f"the weights {list(weights)} are not {sources} numbers >= 0 with a sum above zero")
    return weights


def make_state(
    plan: Plan, manifest_digest: str, split: tuple[Sequence[float], str], consumed_samples: int
) -> dict[str, Any]:
    """What a checkpoint keeps of the data: where it is, and what the order up to there depended on. JSON-like.

    ``split``: the shares of train, valid and test, and ``--split-order``.
    """
    shares, order = split
    stages = plan.describe(consumed_samples)
    return {
        "version": STATE_VERSION,
        "consumed_samples": consumed_samples,
        "consumed_tokens": plan.tokens_before(consumed_samples),
        "seed": plan.seed,
        "lanes": plan.lanes,
        "manifest_digest": manifest_digest,
        "schedule_digest": digest_of([list(shares), stages]),
        "split": list(shares),
        "split_order": order,
        "stages": stages,
        **({} if plan.round_size is None else {"stream_round": plan.round_size}),
    }


_FIELDS = {
    "version": "the version of the data order",
    "seed": "--seed",
    "stream_round": "the documents of a round (--data-order streamed, --stream-round)",
    "lanes": "--data-lanes",
    "manifest_digest": "the content of the --data-path files",
    "split": "--split",
    "split_order": "--split-order",
    "stages": "--seq-length, --data-schedule or the weights in --data-path",
    "schedule_digest": "the sample schedule",
    "consumed_tokens": "the number of tokens read",
}


def _stages_differ(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> str:
    """What the first stage of the schedule that is another one has otherwise."""
    if len(saved) != len(current):
        return f"it read {len(saved)} stages of --seq-length and --data-path weights until then, and now {len(current)}"
    before, now = next((a, b) for a, b in zip(saved, current, strict=True) if a != b)
    names = {
        "sequence_length": "--seq-length",
        "weights": "the blend of --data-path",
        "start_sample": "the sample at which a stage starts",
    }
    return "; ".join(
        f"{words} was {before[key]} and is now {now[key]}" for key, words in names.items() if before[key] != now[key]
    )


def check_state(current: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares a saved state with that of the present run at the same sample.

    Raises:
        UserError: they differ; the message names the first differing field and both values.
    """
    saved = {"split_order": "sequential", **saved}  # runs from before there was another
    for field, meaning in _FIELDS.items():
        if field == "split_order" and saved["split"][0] == 1:
            continue  # every document is for training in any order
        if field == "stream_round" and saved.get(field) == current.get(field):
            continue  # most runs have none
        if field not in saved and field != "stream_round":
            raise UserError(f"the checkpoint's data state has no field '{field}'; it cannot be continued exactly")
        if saved.get(field) != current.get(field):
            changed = f"{meaning} was {saved.get(field)} and is now {current.get(field)}"
            if field == "stages":
                changed = _stages_differ(saved[field], current[field])
            raise UserError(
                f"the checkpoint was trained on another order of samples: {changed}; restore it to continue this run, "
                "add --reset-data to go on with these data from their beginning, or start a new run without --load"
            )
