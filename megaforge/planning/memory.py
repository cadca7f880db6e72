"""Bytes on every pipeline rank: parameters, gradients and optimizer state as declared, activations as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaforge.parallel.pipeline.actions import ActionKind, Schedule
from megaforge.planning.costs import stage_cost
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import ModelParts, StagePart
from megaforge.planning.state_bytes import StateBytes, stage_plan, state_bytes
from megaforge.planning.teacher import teacher_bytes, teacher_pass


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank's bytes at the worst moment of a step.

    Attributes:
        rank: along pp.
        stages: its stages, and which blocks each holds.
        in_flight: most micro-batches (of a stage each) whose activations are alive at once.
        activations: what they keep.
        host: activations that are kept in host memory; not in :attr:`total`.
        buffers: temporaries of one backward pass, recomputed activations, communication buckets, libraries; of a
            teacher's forward pass where they are more.
        teacher: weights of the model of ``--distill-from``.
        making: of a round, before the step's first micro-batch: instead of activations and buffers.
        made: what is kept of a round in host memory, by what it is; not in :attr:`total`.
    """

    rank: int
    stages: tuple[StagePart, ...]
    state: StateBytes
    in_flight: int
    activations: float
    buffers: float
    host: float = 0.0
    teacher: int = 0
    making: float = 0.0
    made: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.state.total + self.teacher + max(self.activations + self.buffers, self.making)


def peak_activations(
    schedule: Schedule, rank: int, stage_bytes: Sequence[float], brought_back: Sequence[float] | None = None
) -> tuple[float, int]:
    """(most bytes of activations alive at once on ``rank``, most activations alive), walking its actions.

    A backward pass split in two halves keeps its activations until the second, as the executor does, and with them
    the ``brought_back`` bytes that the first half computed again.
    """
    again = [0.0] * len(stage_bytes) if brought_back is None else brought_back
    live = peak = 0.0
    count = most = 0
    for action in schedule.actions[rank]:
        if action.kind is ActionKind.FORWARD:
            live, count = live + stage_bytes[action.stage], count + 1
        elif action.kind is ActionKind.BACKWARD_INPUT:
            live += again[action.stage]
        elif action.kind is ActionKind.BACKWARD_WEIGHT:
            live, count = live - stage_bytes[action.stage] - again[action.stage], count - 1
        else:
            live, count = live - stage_bytes[action.stage], count - 1
        peak, most = max(peak, live), max(most, count)
    return peak, most


def rank_state(parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], rank: int) -> StateBytes:
    """The state of pipeline rank ``rank``, of its fullest rank along the other axes."""
    return state_bytes(parts, [stages[stage] for stage in layout.schedule.stages_of(rank)], layout)


def least_memory(parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], rank: int) -> float:
    """Bytes that pipeline rank ``rank`` needs at least, known before halves of a backward pass are measured: its state,
    and activations of the micro-batches in flight."""
    own = set(layout.schedule.stages_of(rank))
    kept = [stage_cost(parts, layout.unsplit, s).kept if number in own else 0.0 for number, s in enumerate(stages)]
    state = rank_state(parts, layout, stages, rank).total + teacher_bytes(layout)
    return state + layout.libraries + peak_activations(layout.schedule, rank, kept)[0]


def rank_memory(
    parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], rank: int, libraries: float | None = None
) -> RankMemory:
    """The memory of pipeline rank ``rank``: of its largest rank along the other axes."""
    schedule = layout.schedule
    own = tuple(stages[stage] for stage in schedule.stages_of(rank))
    costs = [stage_cost(parts, layout, stage) if stage in own else None for stage in stages]
    kept, waiting = ([0.0 if cost is None else getattr(cost, name) for cost in costs] for name in ("kept", "waiting"))
    activations, in_flight = peak_activations(schedule, rank, kept, waiting)
    host, _ = peak_activations(schedule, rank, [0.0 if cost is None else cost.host for cost in costs])
    # Under --zero 2 gradients that have arrived but are not yet sharded: two buckets.
    arrived = 2.0 * stage_plan(parts, own, layout).largest_bucket if layout.zero > 1 else 0.0
    working = max(teacher_pass(layout), *(cost.working for cost in costs if cost is not None))
    rounds = layout.rounds
    working += rounds.step_bytes(parts, layout) if rounds is not None and own[-1].last else 0.0
    resident = layout.libraries if libraries is None else libraries
    buffers, state = working + arrived + resident, rank_state(parts, layout, stages, rank)
    memory = RankMemory(rank, own, state, in_flight, activations, buffers, host, teacher_bytes(layout))
    if rounds is None:
        return memory
    making, made = rounds.device_bytes(parts, layout, own) + resident, rounds.host_bytes(parts, layout)
    return replace(memory, making=making, made=made)
