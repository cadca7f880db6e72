"""What a pipeline stage needs for one micro-batch, put together from the measured costs of its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from megaforge.nn.offload import AHEAD
from megaforge.planning.counting_group import Sent
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.measure import Cost, Shapes, Sizes, measure_block, measure_end, measure_layer
from megaforge.planning.stages import ModelParts, StagePart


def _sizes(layout: PlannedLayout, recompute: str, experts: bool) -> Sizes:
    """``experts``: whether the part is laid out over ep and etp."""
    sizes = Sizes(*(getattr(layout, name) for name in Sizes._fields))._replace(recompute=recompute)
    return sizes if experts else sizes._replace(ep=1, etp=layout.tp)


def part_cost(parts: ModelParts, layout: PlannedLayout, index: int, place: int, recompute: str = "none") -> Cost:
    """The cost of layer ``place`` of block ``index`` (0: its mixer, 1: its FFN), measured once for layouts and blocks
    that do not differ in what it depends on; ``recompute``: see :class:`Sizes`."""
    block = parts.blocks[index]
    sizes = _sizes(layout, recompute, any(held.spec.expert_dim is not None for held in block.held[place]))
    layer, mixer = block.kind.layers[place], block.kind.mixer
    key = (layer, block.kind.first if layer.is_mixer else mixer.token_shift, sizes)
    if key not in parts.measured:
        arriving = carried_before(parts, layout, index)
        parts.measured[key] = measure_layer(parts.cfg, index, place, sizes, arriving)
    return parts.measured[key]


def neediest_layer(parts: ModelParts, layout: PlannedLayout) -> float:
    """Bytes that the neediest layer of a model keeps and works with when it is trained: no forward pass alone needs
    more."""
    costs = [
        part_cost(parts, layout, index, place)
        for index in parts.alike(range(len(parts.blocks)))
        for place in range(len(parts.blocks[index].held))
    ]
    return max(cost.kept + cost.working for cost in costs)


def whole_cost(parts: ModelParts, layout: PlannedLayout, index: int) -> Cost:
    """The cost of block ``index`` as a whole, as ``--recompute`` has it, measured once for layouts and blocks alike."""
    block = parts.blocks[index]
    experts = any(held.spec.expert_dim is not None for layer in block.held for held in layer)
    key = (block.kind, sizes := _sizes(layout, layout.recompute, experts))
    if key not in parts.measured:
        parts.measured[key] = measure_block(parts.cfg, index, sizes, carried_before(parts, layout, index))
    return parts.measured[key]


def carried_before(parts: ModelParts, layout: PlannedLayout, index: int) -> Shapes:
    """Carried tensors that reach block ``index``."""
    sizes = (parts.cfg, layout.sequence_length // layout.cp, layout.rows, layout.tp)
    kinds = (kind for place in parts.alike(range(index)) for kind in parts.blocks[place].kind.layers)
    return {name: shape for kind in kinds for name, shape in kind.carried(*sizes).items()}


def end_cost(parts: ModelParts, layout: PlannedLayout, *, last: bool) -> Cost:
    """The cost of the embedding, or (``last``) of final norm, head and loss, and of what makes further predictions."""
    experts = last and any(held.spec.expert_dim is not None for held in parts.ahead)
    sizes = _sizes(layout, layout.recompute if last and parts.ahead else "none", experts)
    if (last, sizes) not in parts.measured:
        parts.measured[last, sizes] = measure_end(parts.cfg, sizes, last=last)
    return parts.measured[last, sizes]


def block_costs(parts: ModelParts, layout: PlannedLayout, index: int) -> list[Cost]:
    """The costs of a block's parts under ``--recompute``."""
    layers, recompute = parts.blocks[index].kind.layers, layout.recompute
    if parts.blocks[index].kind.capacity is not None:  # what chooses tokens is in front of its layers and behind them
        return [whole_cost(parts, layout, index)]
    if recompute == "full":
        return [_recomputed(parts, layout, index, range(len(layers)))]
    mixing = {True: recompute if recompute == "selective" else "none", False: "none"}
    return [
        _recomputed(parts, layout, index, range(place, place + 1))
        if recompute == kind.recompute
        else part_cost(parts, layout, index, place, mixing[kind.is_mixer])
        for place, kind in enumerate(layers)
    ]


def _recomputed(parts: ModelParts, layout: PlannedLayout, index: int, places: range) -> Cost:
    """The cost of layers of which only the input is kept, and everything is computed again at once."""
    stays = dataclasses.replace(layout, offload=False)  # what is computed again is: it is needed at once
    costs = [part_cost(parts, stays, index, place) for place in places]
    size, waiting = costs[0].input, 0.0
    again = sum(cost.kept for cost in costs) - size
    if layout.offload:
        return _brought_back(parts, layout, index, places, again + size + max(cost.working for cost in costs))
    if layout.splits_backward:  # what gradients of weights need stays until the second half: only a run can say
        halves = [part_cost(parts, layout, index, place, "full") for place in places]
        waiting = sum(half.kept + half.waiting for half in halves) - size
    return dataclasses.replace(
        costs[0],
        kept=size,
        shared={name: size for cost in costs for name, size in (*cost.reads.items(), *cost.touched.items())},
        working=again + max(cost.working for cost in costs),
        waiting=waiting,
        forward=_total((cost.forward, 1) for cost in costs),
        backward=_total((way, 1) for cost in costs for way in (cost.forward, cost.backward)),
    )


def _brought_back(parts: ModelParts, layout: PlannedLayout, index: int, places: range, working: float) -> Cost:
    """:func:`_recomputed` where inputs are kept in host memory: the first layer's are the whole's, and those of some
    blocks before come back early."""
    costs = [part_cost(parts, layout, index, place, "full") for place in places]
    between = sum(cost.kept + cost.waiting for cost in costs)
    return dataclasses.replace(
        costs[0],
        shared={name: size for cost in costs for name, size in (*cost.shared.items(), *cost.touched.items())},
        working=working,
        ahead=AHEAD * costs[0].input,
        waiting=max(0.0, between - costs[0].kept) if layout.splits_backward else 0.0,
        forward=_total((cost.forward, 1) for cost in costs),
        backward=_total((cost.backward, 1) for cost in costs),
    )


def _total(sent: Iterable[tuple[Sent, int]]) -> Sent:
    total: Sent = {}
    for way, count in sent:
        for axis, size in way.items():
            total[axis] = total.get(axis, 0.0) + count * size
    return total


def stage_cost(parts: ModelParts, layout: PlannedLayout, stage: StagePart) -> Cost:
    """The cost of ``stage``: of one block of every kind, times their number, and of the ends of the model."""
    alike = parts.alike(stage.blocks)
    key = (tuple(alike.items()), stage.ends, _sizes(layout, layout.recompute, experts=True))
    if key in parts.measured:
        return parts.measured[key]
    costs = [(cost, count) for index, count in alike.items() for cost in block_costs(parts, layout, index)]
    costs += [(end_cost(parts, layout, last=last), 1) for last in stage.ends]
    # Tensors that several parts keep are there once, and so is what has arrived from an earlier stage.
    shared = {name: size for cost, _ in costs for name, size in cost.shared.items()}
    arrived = carried_before(parts, layout, stage.blocks.start)
    if layout.offload and not stage.first:  # the executor holds the stage's input, whose gradient it sends back
        shared["x"] = costs[0][0].input
    shared |= {name: size for cost, _ in costs for name, size in cost.reads.items() if name in arrived}
    waiting = sum(count * cost.waiting for cost, count in costs)
    if stage.first:  # its first half has nothing to do; gradients of what it has sent wait for the second
        waiting = crossing_bytes(parts, layout) if layout.splits_backward else 0.0
    parts.measured[key] = Cost(
        input=costs[0][0].input,
        kept=sum(count * cost.kept for cost, count in costs) + sum(shared.values()),
        waiting=waiting,
        working=max(cost.working for cost, _ in costs) + max(cost.ahead for cost, _ in costs),
        host=sum(count * cost.host for cost, count in costs),
        forward=_total((cost.forward, count) for cost, count in costs),
        backward=_total((cost.backward, count) for cost, count in costs),
    )
    return parts.measured[key]


def crossing_bytes(parts: ModelParts, layout: PlannedLayout) -> float:
    """Bytes from one pipeline rank to the next for one micro-batch, in one direction: the residual stream, and carried
    tensors, which cross once whatever the number of virtual stages (counted with every stage here)."""
    elements = sum(map(math.prod, carried_before(parts, layout, len(parts.blocks)).values()))
    return part_cost(parts, layout, 0, 0).input + elements * layout.dtype.itemsize
