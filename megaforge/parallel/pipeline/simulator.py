"""Runs a schedule on paper: checks it, and gives its timeline, bubble and peak of live activations."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule


@dataclass(frozen=True)
class Costs:
    """Time of a stage's computations and of one transfer between ranks, in any one unit.

    Attributes:
        forward, backward_input, backward_weight: of one stage for one microbatch; a whole backward pass costs the sum
            of both halves.
        communication: from the end of a computation to the arrival of its result on another rank.
        stage_scale: multiplies the costs of stage s by ``stage_scale[s]``; empty for equal stages.
        kept_after_input: share of a stage's activation that stays alive between the two halves of a split backward
            pass. 1 for :class:`~megaforge.parallel.pipeline.executor.PipelineExecutor`, whose autograd graph lives on.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    communication: float = 0.0
    stage_scale: tuple[float, ...] = ()
    kept_after_input: float = 1.0

    def duration(self, action: Action) -> float:
        """Time that ``action`` takes."""
        scale = self.stage_scale[action.stage] if self.stage_scale else 1.0
        if action.kind is ActionKind.FORWARD:
            return self.forward * scale
        if action.kind is ActionKind.BACKWARD_INPUT:
            return self.backward_input * scale
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return self.backward_weight * scale
        return (self.backward_input + self.backward_weight) * scale


class Span(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated run: ``spans[rank]`` in order of time."""

    schedule: Schedule
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end over all ranks."""
        return max((rank[-1].end for rank in self.spans if rank), default=0.0)

    def busy(self, rank: int) -> float:
        """Time ``rank`` computes."""
        return sum(span.end - span.start for span in self.spans[rank])

    def bubble_share(self, rank: int | None = None) -> float:
        """Idle share of the makespan of one rank, or of all ranks together."""
        ranks = range(len(self.spans)) if rank is None else (rank,)
        return 1.0 - sum(self.busy(r) for r in ranks) / (len(ranks) * self.makespan) if self.makespan else 0.0

    def window_bubble(self, rank: int) -> float:
        """Idle time between a rank's own first start and last end: what the zero-bubble paper counts, whose optimizer
        step needs no barrier over the ranks."""
        spans = self.spans[rank]
        return spans[-1].end - spans[0].start - self.busy(rank) if spans else 0.0

    def peak_live(self, rank: int) -> float:
        """Most activations alive at once on ``rank``, in activations of one stage for one microbatch."""
        live = peak = 0.0
        kept = self.costs.kept_after_input
        for action in self.schedule.actions[rank]:
            if action.kind is ActionKind.FORWARD:
                live += 1.0
                peak = max(peak, live)
            elif action.kind is ActionKind.BACKWARD:
                live -= 1.0
            else:
                live -= 1.0 - kept if action.kind is ActionKind.BACKWARD_INPUT else kept
        return peak


def needs(schedule: Schedule, action: Action, is_split: bool) -> list[Action]:
    """The actions whose results ``action`` uses; ``is_split`` says whether stage + 1 splits this backward pass."""
    kind, stage, microbatch = action
    if kind is ActionKind.FORWARD:
        return [Action(ActionKind.FORWARD, stage - 1, microbatch)] if stage else []
    if kind is ActionKind.BACKWARD_WEIGHT:
        return [Action(ActionKind.BACKWARD_INPUT, stage, microbatch)]
    before = [Action(ActionKind.FORWARD, stage, microbatch)]
    if stage + 1 < schedule.num_stages:
        before.append(Action(ActionKind.BACKWARD_INPUT if is_split else ActionKind.BACKWARD, stage + 1, microbatch))
    return before


def check_complete(schedule: Schedule, *, forward_only: bool = False) -> None:
    """Checks that every stage runs every microbatch forward once and backward once, whole or in two halves, in order,
    on the rank that holds it.

    Raises:
        UserError: naming the rank and the action that is missing, doubled, misplaced or too early.
    """
    for rank, actions in enumerate(schedule.actions):
        where = f"pipeline schedule '{schedule.name}', rank {rank}"
        stages = schedule.stages_of(rank)
        for action, count in Counter(actions).items():
            if action.stage not in stages or not 0 <= action.microbatch < schedule.num_microbatches:
                raise UserError(
                    f"{where}: {action} is out of place; this rank holds stages {stages} of {schedule.num_stages}"
                )
            if count > 1:
                raise UserError(f"{where}: {action} occurs {count} times instead of once")
        done: dict[tuple[int, int], str] = defaultdict(str)
        for action in actions:
            done[action.stage, action.microbatch] += action.kind.value
        valid = ("F",) if forward_only else ("FB", "FIW")
        for stage in stages:
            for microbatch in range(schedule.num_microbatches):
                if done[stage, microbatch] not in valid:
                    raise UserError(
                        f"{where}: stage {stage}, microbatch {microbatch} runs '{done[stage, microbatch]}' "
                        f"instead of {' or '.join(valid)}"
                    )


def simulate(schedule: Schedule, costs: Costs | None = None, *, forward_only: bool = False) -> Timeline:
    """The timeline of ``schedule``: every action starts as soon as its rank is free and its inputs have arrived.

    Raises:
        UserError: an action is missing, doubled or out of order, or the ranks would wait for each other forever; the
            message names what each rank waits for.
    """
    check_complete(schedule, forward_only=forward_only)
    costs = costs or Costs()
    split = {(a.stage, a.microbatch) for rank in schedule.actions for a in rank if a.kind is ActionKind.BACKWARD_INPUT}
    ends: dict[Action, float] = {}
    waiting: dict[Action, int] = {}
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        free = spans[rank][-1].end if spans[rank] else 0.0
        for action in schedule.actions[rank][len(spans[rank]) :]:
            before = needs(schedule, action, (action.stage + 1, action.microbatch) in split)
            missing = next((a for a in before if a not in ends), None)
            if missing is not None:
                waiting[missing] = rank
                break
            arrivals = [ends[a] + (costs.communication if schedule.rank_of(a.stage) != rank else 0.0) for a in before]
            start = max([free, *arrivals])
            free = ends[action] = start + costs.duration(action)
            spans[rank].append(Span(action, start, free))
            if action in waiting:
                ready.append(waiting.pop(action))
    _refuse_unfinished(schedule, spans, waiting)
    return Timeline(schedule, costs, tuple(tuple(rank) for rank in spans))


def _refuse_unfinished(schedule: Schedule, spans: list[list[Span]], waiting: dict[Action, int]) -> None:
    stuck = [
        f"rank {rank} waits before {schedule.actions[rank][len(spans[rank])]} for {action}"
        for action, rank in sorted(waiting.items(), key=lambda item: item[1])
    ]
    if stuck:
        raise UserError(f"pipeline schedule '{schedule.name}' deadlocks: {'; '.join(stuck)}")
