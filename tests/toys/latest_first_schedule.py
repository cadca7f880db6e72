"""A pipeline schedule of a user's own: all forwards, then all backwards, the latest microbatch's first."""

from __future__ import annotations

from megaforge.parallel.pipeline.actions import Action, ActionKind
from megaforge.parallel.pipeline.schedules import ScheduleRule
from megaforge.registry import SCHEDULES


def latest_first(num_ranks: int, rank: int, num_chunks: int, num_microbatches: int) -> list[Action]:
    order = range(num_microbatches)
    forward = [Action(ActionKind.FORWARD, rank, i) for i in order]
    return forward + [Action(ActionKind.BACKWARD, rank, i) for i in reversed(order)]


SCHEDULES.register("latest-first", ScheduleRule("the latest microbatch's backward pass first", latest_first))
