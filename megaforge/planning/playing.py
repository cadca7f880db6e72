"""What ``--objective agent`` takes beside its steps: episodes are played, and their decisions scored by the policy and
by its reference, in passes of the trained model without gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.planning.costs import part_cost
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import ModelParts, StagePart
from megaforge.planning.time import StageTime, stage_times


@dataclass(frozen=True)
class PlayTime:
    """Seconds of a round.

    Attributes:
        least, most: of playing: no window ever grows, or each as often as it can.
        scored: of a pass over the decisions, for their old probabilities.
        reference: of one more, without adapters; 0 where there are none.
    """

    least: float
    most: float
    scored: float
    reference: float


def play_time(
    parts: ModelParts,
    layout: PlannedLayout,
    stages: Sequence[StagePart],
    gpu: Gpu,
    efficiency: Efficiency | None = None,
) -> PlayTime | None:
    """That of a round of episodes; None: none are played."""
    if (episodes := layout.episodes) is None:
        return None
    efficiency = efficiency or Efficiency()
    own, length = layout.global_batch_size // layout.dp, layout.sequence_length
    looks = [episodes.looked_at(own, length, most=most) for most in (False, True)]
    seen = dataclasses.replace(layout, episodes=None)  # rows of at most a micro-batch
    times = stage_times(parts, seen, stages, gpu, efficiency)
    least, most = (_forward(layout, times, -(-rows // layout.micro_batch_size)) for rows in looks)
    scored = _forward(layout, stage_times(parts, layout, stages, gpu, efficiency), layout.micro_batches)
    return PlayTime(least, (episodes.changes + 1) * most, scored, scored if episodes.has_reference else 0.0)


def _forward(layout: PlannedLayout, times: Sequence[StageTime], micro_batches: int) -> float:
    """Seconds of a pass over so many micro-batches: the slowest rank's, and what it waits for the others."""
    ranks = [sum(times[stage].forward for stage in layout.schedule.stages_of(rank)) for rank in range(layout.pp)]
    return micro_batches * max(ranks) + sum(ranks) - max(ranks)


def heads_bytes(parts: ModelParts, layout: PlannedLayout) -> float:
    """Bytes that the losses of an agent's heads need of a micro-batch, where the last stage is: whole hidden vectors,
    those that the summariser takes means of, and their gradient."""
    return 0.0 if layout.episodes is None else 3.0 * layout.tokens * parts.cfg.hidden_size * layout.wide_size


def play_bytes(parts: ModelParts, layout: PlannedLayout) -> tuple[float, float]:
    """(bytes that playing needs on the device of a last stage's rank, where no activations are then; bytes of what was
    seen, in host memory), at most; zero where nothing is played."""
    if (episodes := layout.episodes) is None:
        return 0.0, 0.0
    length, width = layout.sequence_length, parts.cfg.hidden_size
    vectors = episodes.vectors(layout.global_batch_size // layout.dp, length)
    seen = vectors * (width + 1) * layout.wide_size
    plain = dataclasses.replace(layout.unsplit, episodes=None, recompute="none", offload=False, compress=False)
    costs = [
        part_cost(parts, plain, index, place)
        for index in parts.alike(range(len(parts.blocks)))
        for place in range(len(parts.blocks[index].held))
    ]
    # A layer at its neediest, no more than when it is trained; behind the last one whole hidden vectors, and weighted.
    hidden = 2 * plain.tokens * width * layout.wide_size
    device = 2 * seen + max(hidden, *(cost.kept + cost.working for cost in costs))
    return device, (episodes.changes + 1) * (seen + vectors * episodes.memory_dim * layout.wide_size)
