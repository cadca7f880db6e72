"""Bytes that one rank sends in a step along every axis, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.planning.activations import Sizes
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import DeclaredParameter, ModelParts, StagePart, stage_parameters

TRAFFIC_AXES = ("tp", "sp", "cp", "ep", "etp", "pp", "dp")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends: ``forward`` and ``backward`` of one micro-batch on one stage, by axis."""

    forward: dict[str, float]
    backward: dict[str, float]

    def total(self, axis: str) -> float:
        return self.forward.get(axis, 0.0) + self.backward.get(axis, 0.0)


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-gather or reduce-scatter of ``size`` bytes (the whole): a ring's."""
    return size * (ranks - 1) / ranks


def stage_traffic(parts: ModelParts, layout: PlannedLayout, stage: StagePart) -> Traffic:
    """What one micro-batch sends on a stage along tp (or sp, its form under sequence parallelism), cp, ep and etp.

    Recomputed forward passes are counted in the backward pass.
    """
    forward: dict[str, float] = {}
    again: dict[str, float] = {}
    sizes = Sizes(parts.cfg, layout)
    full = layout.recompute == "full"
    for index, count in parts.alike(stage.blocks).items():
        kind = parts.blocks[index].kind
        mixer = _times(count, _mixer_traffic(sizes, kind.mixer))
        ffn = {} if kind.ffn is None else _times(count, _ffn_traffic(sizes, kind.ffn, kind.channel_mix))
        _add(forward, mixer, ffn)
        mixing = {axis: size for axis, size in mixer.items() if axis == "cp"}
        _add(again, mixer if full else mixing if layout.recompute == "selective" else {})
        _add(again, ffn if full or (layout.recompute == "moe" and kind.ffn == "moe") else {})
    ends = _region(sizes) if stage.last else {}
    _add(forward, _region(sizes) if stage.first else {}, ends)
    backward: dict[str, float] = {}
    _add(backward, forward, again)
    return Traffic(forward, backward)


def _add(total: dict[str, float], *parts: dict[str, float]) -> None:
    for part in parts:
        for axis, size in part.items():
            total[axis] = total.get(axis, 0.0) + size


def _times(count: int, traffic: dict[str, float]) -> dict[str, float]:
    return {axis: count * size for axis, size in traffic.items()}


def _region(sizes: Sizes) -> dict[str, float]:
    """In and out of the tensor-parallel region in one direction: one all-reduce, or an all-gather and a
    reduce-scatter, which send the same."""
    layout = sizes.layout
    axis = "sp" if layout.sequence_parallel else "tp"
    return {axis: 2 * ring(sizes.inside, layout.tp)} if layout.tp > 1 else {}


def _mixer_traffic(sizes: Sizes, mixer: str) -> dict[str, float]:
    cfg, layout = sizes.cfg, sizes.layout
    traffic = _region(sizes)
    if layout.cp > 1 and mixer == "attention":
        keys = 2 * sizes.tokens * cfg.query_groups * cfg.head_dim / layout.tp * layout.element_size
        traffic["cp"] = keys * (layout.cp - 1)
    elif layout.cp > 1:
        # Summaries (P, Q) of two chunks of every sequence, [N, N] in fp32 for each head.
        state = cfg.hidden_size / layout.tp * cfg.rwkv_head_size * layout.wide_size
        traffic["cp"] = 2 * 2 * state * layout.micro_batch_size * (layout.cp - 1)
    return traffic


def _ffn_traffic(sizes: Sizes, ffn: str, channel_mix: bool) -> dict[str, float]:
    cfg, layout = sizes.cfg, sizes.layout
    if ffn == "dense" or (layout.ep == 1 and layout.etp == layout.tp):
        return _region(sizes)
    rows = sizes.routed_tokens * cfg.moe_router_topk * cfg.hidden_size * layout.element_size
    traffic = {"ep": 2 * ring(rows, layout.ep)} if layout.ep > 1 else {}
    if layout.etp > 1:
        traffic["etp"] = 2 * rows * (layout.etp - 1)
    if layout.tp > 1 and (channel_mix or not layout.sequence_parallel):
        # The shift needs every token once more; without sequence parallelism the tokens are put together again.
        axis = "sp" if layout.sequence_parallel else "tp"
        traffic[axis] = ring(sizes.inside, layout.tp)
    return traffic


def crossing_bytes(sizes: Sizes) -> float:
    """Bytes from one pipeline rank to the next for one micro-batch, in one direction: the residual stream, and v_first,
    which crosses once whatever the number of virtual stages (counted with every stage here)."""
    has_rwkv = sizes.layout.pp > 1
    return sizes.residual + (sizes.split if has_rwkv else 0.0)


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
        count = float(copies * math.prod(item.spec.local_shape(ctx)))
        ranks = ctx.axis(item.spec.replica_axis).size
        sent = ring(count * max(4, item.element_size), ranks)
        if layout.zero:
            reduced += sent * (layout.micro_batches if layout.zero > 1 else 1)
            gathered += ring(count * item.element_size, ranks)
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
        traffic = stage_traffic(parts, layout, stage)
        for axis in TRAFFIC_AXES:
            total[axis] += traffic.total(axis) * layout.micro_batches
        crossings = (not stage.last) + (not stage.first)
        total["pp"] += crossings * crossing_bytes(Sizes(parts.cfg, layout)) * layout.micro_batches
    gradients = gradient_traffic(stage_parameters(parts, own), layout)
    total["dp"] = gradients.reduced + gradients.gathered
    return total
