"""Which layers go to which pipeline stage."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise

from megaforge.errors import UserError


def partition_layers(costs: Sequence[float], num_stages: int, cuts: Sequence[int] = ()) -> list[range]:
    """Contiguous, non-empty ranges of layers, one per stage, whose most expensive stage is as cheap as possible.

    Among the partitions with that maximum, the one with the smallest sum of squared stage costs (the most even one)
    is taken. Costs may include the embedding and the head as layers of their own.

    Args:
        costs: of each layer, in any unit, not negative.
        num_stages: pp * vpp.
        cuts: where the layer pattern says ``|``: number of layers before each cut. Empty: the cuts are chosen here.

    Raises:
        UserError: more stages than layers, or the cuts make another number of stages or an empty one.
    """
    if num_stages > len(costs):
        raise UserError(
            f"--pp times --vpp is {num_stages} stages, but there are only {len(costs)} layers to cut; "
            f"use at most {len(costs)} stages"
        )
    if cuts:
        bounds = [0, *cuts, len(costs)]
        if len(bounds) - 1 != num_stages:
            raise UserError(
                f"--hybrid-layer-pattern is cut by '|' into {len(bounds) - 1} stages, but --pp times --vpp "
                f"is {num_stages}; make {num_stages - 1} cuts, or none to have them chosen by cost"
            )
        if any(start >= end for start, end in pairwise(bounds)):
            raise UserError(
                f"--hybrid-layer-pattern has an empty stage: its '|' stand after {list(cuts)} of {len(costs)} layers"
            )
    else:
        bounds = _balanced_bounds(costs, num_stages)
    return [range(start, end) for start, end in pairwise(bounds)]


def _balanced_bounds(costs: Sequence[float], num_stages: int) -> list[int]:
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    maximum, _ = _best(prefix, num_stages, combine=max, limit=float("inf"), power=1)
    # Sums of the same costs from other starting points may differ in the last bits.
    limit = maximum * (1 + 1e-12)
    _, bounds = _best(prefix, num_stages, combine=operator.add, limit=limit, power=2)
    return bounds


def _best(
    prefix: list[float], num_stages: int, *, combine: Callable[[float, float], float], limit: float, power: int
) -> tuple[float, list[int]]:
    """Dynamic programming over (stages used, layers used): the partition with the least combination of the stages'
    costs to ``power``, none of them above ``limit``."""
    layers = len(prefix) - 1
    infinite = float("inf")
    best = [0.0] + [infinite] * layers
    choices: list[list[int]] = []
    for stage in range(1, num_stages + 1):
        following = [infinite] * (layers + 1)
        choice = [0] * (layers + 1)
        for end in range(stage, layers - (num_stages - stage) + 1):
            for start in range(stage - 1, end):
                cost = prefix[end] - prefix[start]
                if cost <= limit and (value := combine(best[start], cost**power)) < following[end]:
                    following[end], choice[end] = value, start
        best = following
        choices.append(choice)
    bounds = [layers]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return best[layers], bounds[::-1]
