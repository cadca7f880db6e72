"""What a pipeline stage needs for one micro-batch, put together from the measured costs of its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from megaforge.planning.counting_group import Sent
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.measure import Cost, Shapes, Sizes, measure_block, measure_end
from megaforge.planning.stages import ModelParts, StagePart


def _sizes(layout: PlannedLayout, recompute: str, experts: bool) -> Sizes:
    """``experts``: whether the part is laid out over ep and etp."""
    return Sizes(
        tp=layout.tp,
        cp=layout.cp,
        cp_comm_type=layout.cp_comm_type,
        ep=layout.ep if experts else 1,
        etp=layout.etp if experts else layout.tp,
        sequence_parallel=layout.sequence_parallel,
        micro_batch_size=layout.micro_batch_size,
        sequence_length=layout.sequence_length,
        dtype=layout.dtype,
        device_type=layout.device_type,
        recompute=recompute,
        split=layout.splits_backward,
    )


def part_cost(parts: ModelParts, layout: PlannedLayout, index: int, part: str, recompute: str = "none") -> Cost:
    """The cost of the ``mixer`` or the ``ffn`` of block ``index``, measured once for layouts that do not differ in
    what it depends on; ``recompute``: see :class:`Sizes`."""
    block = parts.blocks[index]
    experts = part == "ffn" and any(held.spec.expert_dim is not None for held in block.ffn)
    sizes = _sizes(layout, recompute, experts)
    key = (index if part == "mixer" else parts.first_with_ffn(index), part, sizes)
    if key not in parts.measured:
        arriving = carried_before(parts, layout, index) if part == "mixer" else {}
        parts.measured[key] = measure_block(parts.cfg, index, part, sizes, arriving)
    return parts.measured[key]


def carried_before(parts: ModelParts, layout: PlannedLayout, index: int) -> Shapes:
    """Carried tensors that reach block ``index``."""
    sizes = (parts.cfg, layout.sequence_length // layout.cp, layout.micro_batch_size, layout.tp)
    kinds = (kind for place in parts.alike(range(index)) for kind in parts.blocks[place].kind.layers)
    return {name: shape for kind in kinds for name, shape in kind.carried(*sizes).items()}


def end_cost(parts: ModelParts, layout: PlannedLayout, *, last: bool) -> Cost:
    """The cost of the embedding, or (``last``) of final norm, head and loss."""
    sizes = _sizes(layout, "none", experts=False)
    if (last, sizes) not in parts.measured:
        parts.measured[last, sizes] = measure_end(parts.cfg, sizes, last=last)
    return parts.measured[last, sizes]


def block_costs(parts: ModelParts, layout: PlannedLayout, index: int) -> list[Cost]:
    """The costs of a block's parts under ``--recompute``."""
    kind, recompute = parts.blocks[index].kind, layout.recompute
    names = ["mixer"] if kind.ffn is None else ["mixer", "ffn"]
    if recompute == "full":
        return [_recomputed(parts, layout, index, names)]
    if kind.ffn is not None and recompute == kind.ffn.recompute:
        return [part_cost(parts, layout, index, "mixer"), _recomputed(parts, layout, index, ["ffn"])]
    modes = {"mixer": "selective" if recompute == "selective" else "none", "ffn": "none"}
    return [part_cost(parts, layout, index, name, modes[name]) for name in names]


def _recomputed(parts: ModelParts, layout: PlannedLayout, index: int, names: list[str]) -> Cost:
    """The cost of parts of which only the input is kept, and everything is computed again at once."""
    costs = [part_cost(parts, layout, index, name) for name in names]
    size, waiting = costs[0].input, 0.0
    again = sum(cost.kept for cost in costs) - size
    if layout.splits_backward:  # what gradients of weights need stays until the second half: only a run can say
        halves = [part_cost(parts, layout, index, name, "full") for name in names]
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


def _total(sent: Iterable[tuple[Sent, int]]) -> Sent:
    total: Sent = {}
    for way, count in sent:
        for axis, size in way.items():
            total[axis] = total.get(axis, 0.0) + count * size
    return total


@dataclass(frozen=True)
class StageCost:
    """Bytes of one micro-batch on one stage.

    Attributes:
        kept: between its forward and its backward pass.
        waiting: between the halves of a backward pass that the schedule splits, besides; 0 where it does not.
        working: the most that a pass needs besides for a while.
        forward, backward: sent along tp (or sp, its form under sequence parallelism), cp, ep and etp; what is computed
            again counts as backward.
    """

    kept: float
    waiting: float
    working: float
    forward: Sent
    backward: Sent

    def sent(self, axis: str) -> float:
        return self.forward.get(axis, 0.0) + self.backward.get(axis, 0.0)


def stage_cost(parts: ModelParts, layout: PlannedLayout, stage: StagePart) -> StageCost:
    """The cost of ``stage``: of one block of every kind, times their number, and of the ends of the model."""
    alike = parts.alike(stage.blocks)
    key = (tuple(alike.items()), stage.first, stage.last, layout.recompute, _sizes(layout, "", experts=True))
    if key in parts.measured:
        found: StageCost = parts.measured[key]
        return found
    costs = [(cost, count) for index, count in alike.items() for cost in block_costs(parts, layout, index)]
    costs += [
        (end_cost(parts, layout, last=last), 1) for last in (False, True) if (stage.last if last else stage.first)
    ]
    # Tensors that several parts keep are there once, and so is what has arrived from an earlier stage.
    shared = {name: size for cost, _ in costs for name, size in cost.shared.items()}
    arrived = carried_before(parts, layout, stage.blocks.start)
    shared |= {name: size for cost, _ in costs for name, size in cost.reads.items() if name in arrived}
    waiting = sum(count * cost.waiting for cost, count in costs)
    if stage.first:  # its first half has nothing to do; gradients of what it has sent wait for the second
        waiting = crossing_bytes(parts, layout) if layout.splits_backward else 0.0
    parts.measured[key] = StageCost(
        kept=sum(count * cost.kept for cost, count in costs) + sum(shared.values()),
        waiting=waiting,
        working=max(cost.working for cost, _ in costs),
        forward=_total((cost.forward, count) for cost, count in costs),
        backward=_total((cost.backward, count) for cost, count in costs),
    )
    return stage_cost(parts, layout, stage)


def crossing_bytes(parts: ModelParts, layout: PlannedLayout) -> float:
    """Bytes from one pipeline rank to the next for one micro-batch, in one direction: the residual stream, and carried
    tensors, which cross once whatever the number of virtual stages (counted with every stage here)."""
    elements = sum(map(math.prod, carried_before(parts, layout, len(parts.blocks)).values()))
    return part_cost(parts, layout, 0, "mixer").input + elements * layout.dtype.itemsize
