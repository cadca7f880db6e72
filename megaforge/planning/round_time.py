"""How long a round takes beside the steps that learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import ModelParts, StagePart
from megaforge.planning.time import StageTime, stage_times


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round.

    Attributes:
        least, most: of making it.
        scored: of a pass over what was made, for its old probabilities.
        reference: of one more, without adapters; 0 where there are none.
    """

    least: float
    most: float
    scored: float
    reference: float


def round_time(
    parts: ModelParts,
    layout: PlannedLayout,
    stages: Sequence[StagePart],
    gpu: Gpu,
    efficiency: Efficiency | None = None,
) -> RoundTime | None:
    """That of a layout's rounds; None: it has none."""
    if (rounds := layout.rounds) is None:
        return None
    efficiency = efficiency or Efficiency()
    least, most = rounds.seconds(parts, layout, stages, gpu, efficiency)
    scored = forward_seconds(layout, stage_times(parts, layout, stages, gpu, efficiency), layout.micro_batches)
    return RoundTime(least, most, scored, scored if rounds.has_reference else 0.0)


def forward_seconds(layout: PlannedLayout, times: Sequence[StageTime], micro_batches: int) -> float:
    """Of a pass over so many micro-batches: the slowest rank's, and what it waits for the others."""
    ranks = [sum(times[stage].forward for stage in layout.schedule.stages_of(rank)) for rank in range(layout.pp)]
    return micro_batches * max(ranks) + sum(ranks) - max(ranks)
