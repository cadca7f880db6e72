"""Bytes that one rank sends in a step along every axis, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.planning.costs import crossing_bytes, stage_cost
from megaforge.planning.counting_group import ring
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import DeclaredParameter, ModelParts, StagePart, stage_parameters

TRAFFIC_AXES = ("tp", "sp", "cp", "ep", "etp", "pp", "dp")


@dataclass(frozen=True)
class GradientTraffic:
    """Bytes of a step's reduction over replicas: ``reduced`` at the end of the backward pass (or in every
    micro-batch), ``gathered`` while the next forward pass runs."""

    reduced: float
    gathered: float


def gradient_traffic(held: Sequence[tuple[DeclaredParameter, int]], layout: PlannedLayout) -> GradientTraffic:
    """The reduction of gradients over dp (and cp; edp for experts), and ZeRO's all-gather of parameters."""
    ctx = layout.context()
    reduced = gathered = 0.0
    for item, copies in held:
        if not item.is_trained:
            continue
        count = float(copies * math.prod(item.spec.local_shape(ctx)))
        ranks = ctx.axis(item.spec.replica_axis).size
        sent = ring(count * max(4, item.element_size), ranks)
        if layout.zero:
            reduced += sent * (layout.micro_batches if layout.zero > 1 else 1)
            coded = layout.code_bits and item.spec.quantized
            gathered += ring(count * (layout.code_bits / 8 if coded else item.element_size), ranks)
        else:
            reduced += 2 * sent
    return GradientTraffic(reduced, gathered)


def bandwidth(layout: PlannedLayout, axis: str, gpu: Gpu, efficiency: Efficiency) -> float:
    """Bytes/s that one rank sends along ``axis``: NVLink where its group fits a server, otherwise the network, shared
    with the group's other ranks in the server (a ring enters and leaves a server once for all of them)."""
    stride, size = {
        "tp": (1, layout.tp),
        "sp": (1, layout.tp),
        "cp": (layout.tp, layout.cp),
        "dp": (layout.tp, layout.cp * layout.dp),
        "etp": (1, layout.etp),
        "ep": (layout.etp, layout.ep),
        "pp": (layout.stage_ranks, layout.pp),
    }[axis]
    inside = gpu.node_bandwidth * efficiency.node
    if stride * size <= gpu.node_size:
        return inside
    network = gpu.network_bandwidth * efficiency.network
    local = max(1, gpu.node_size // stride)
    if axis == "ep":  # all-to-all: what stays in the server is free beside what leaves it
        return network * (size - 1) / max(1, size - local)
    return network if axis == "pp" else min(inside, network * local)


def step_traffic(parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], rank: int) -> dict[str, float]:
    """Bytes that a rank of pipeline rank ``rank`` sends in one step, by axis."""
    total = dict.fromkeys(TRAFFIC_AXES, 0.0)
    own = [stage for number, stage in enumerate(stages) if layout.schedule.rank_of(number) == rank]
    for stage in own:
        cost = stage_cost(parts, layout.unsplit, stage)
        for axis in TRAFFIC_AXES:
            total[axis] += cost.sent(axis) * layout.micro_batches
        crossings = (not stage.last) + (not stage.first)
        total["pp"] += crossings * crossing_bytes(parts, layout.unsplit) * layout.micro_batches
    gradients = gradient_traffic(stage_parameters(parts, own), layout)
    total["dp"] = gradients.reduced + gradients.gathered
    return total
