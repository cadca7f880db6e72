"""Bytes that training keeps between micro-batches: parameters, gradients and optimizer state as they are declared, in
the buckets that training makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaforge.optim.gradient_filter import filter_rows
from megaforge.optim.optimizer import bucket_policy, rule_of
from megaforge.parallel.buckets import BucketPlan, Member, cut_anywhere, plan_buckets, range_in_slice, with_codes
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.pipeline.tied import tied_ranks
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.stages import DeclaredParameter, ModelParts, StagePart, chunk_parameters

_REPLICA_AXES = ("dp_cp", "edp")


@dataclass(frozen=True)
class StateBytes:
    """What training keeps between micro-batches on one rank.

    Attributes:
        parameters: in their own types; with the codes that quantized ones have between two updates.
        gradients: the fp32 sums (fp64 for fp64 models).
        optimizer: fp32 masters of 16-bit parameters, and what the update rule, a gradient filter, the average
            of the weights and a policy's first ones keep.
        elements: number of parameters.
        host: what the update rule keeps in host memory; not in :attr:`total`.
    """

    parameters: int
    gradients: int
    optimizer: int
    elements: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass
class _Share:
    """Bytes of masters and state on one replica."""

    device: int = 0
    host: int = 0

    def add(self, more: tuple[int, int]) -> None:
        self.device += more[0]
        self.host += more[1]


@dataclass(frozen=True)
class StagePlan:
    """What the ranks of a pipeline rank hold, before ZeRO shares it out.

    Attributes:
        elements: number of parameters.
        alone: bytes of parameters that no rule updates.
        buckets: of the others, each with the parameters in it.
    """

    elements: int
    alone: int
    buckets: tuple[tuple[BucketPlan, tuple[DeclaredParameter, ...]], ...]

    @property
    def largest_bucket(self) -> int:
        """Bytes of the gradients in it."""
        return max((plan.size * _wide(held[0]) for plan, held in self.buckets), default=0)


class _Weight(NamedTuple):
    """What of a parameter a rank keeps in masters and state; bytes are (on the device, in host memory).

    Attributes:
        numel: elements on a rank, before ZeRO shares them out.
        each: bytes of each element.
        whole: bytes beside them where a rank updates the parameter: state of another shape than its own.
    """

    numel: int
    each: tuple[int, int]
    whole: tuple[int, int]

    def bytes_of(self, elements: int) -> tuple[int, int]:
        """Of so many elements on one rank."""
        device, host = (elements * each + (whole if elements else 0) for each, whole in zip(*self[1:], strict=True))
        return device, host


def stage_plan(parts: ModelParts, own: Sequence[StagePart], layout: PlannedLayout) -> StagePlan:
    """The buckets that training makes of the stages ``own`` of a pipeline rank."""
    key = ("buckets", *_key(own, layout))
    if key not in parts.measured:
        parts.measured[key] = _plan(parts, own, layout)
    plan: StagePlan = parts.measured[key]
    return plan


def _key(own: Sequence[StagePart], layout: PlannedLayout) -> tuple[object, ...]:
    """What the buckets of a pipeline rank depend on."""
    sizes = (layout.world_size, layout.tp, layout.cp, layout.pp, layout.ep, layout.etp)
    return (
        tuple(own),
        _copies_tied(layout),
        sizes,
        layout.zero > 0,
        layout.bucket_size,
        layout.optimizer,
        layout.weight_copies,
        layout.code_bits,
    )


def _copies_tied(layout: PlannedLayout) -> bool:
    if layout.pp == 1:
        return False
    first, last = tied_ranks(layout.schedule)
    return first != last


def _plan(parts: ModelParts, own: Sequence[StagePart], layout: PlannedLayout) -> StagePlan:
    ctx = layout.context()
    policy = bucket_policy(layout.optimizer) if layout.zero else cut_anywhere
    policy = with_codes(policy) if layout.zero and layout.code_bits else policy
    numel: dict[int, int] = {}  # of a rank, by declaration
    elements = alone = 0
    buckets = []
    for chunk in chunk_parameters(parts, own, _copies_tied(layout)):
        for item in chunk:
            if id(item) not in numel:
                numel[id(item)] = math.prod(item.spec.local_shape(ctx))
            elements += numel[id(item)]
            alone += 0 if item.is_trained else numel[id(item)] * item.element_size
        trained = [item for item in chunk if item.is_trained]
        members = [Member(item.spec, numel[id(item)], item.dtype) for item in trained]
        for plan in plan_buckets(members, ctx, layout.bucket_size, policy):
            buckets.append((plan, tuple(trained[place] for place in plan.members)))
    return StagePlan(elements, alone, tuple(buckets))


def _wide(item: DeclaredParameter) -> int:
    """Bytes of an element of its gradient, its master and its state."""
    return max(4, item.element_size)


def _weight(item: DeclaredParameter, layout: PlannedLayout, ctx: ParallelContext) -> _Weight:
    config, wide, rule = layout.optimizer, _wide(item), rule_of(layout.optimizer, item.spec)
    specs = [rule.state_spec(config, name, item.spec) for name in rule.states(config)]
    state = sum(spec is item.spec for spec in specs) * wide
    other = sum(math.prod(spec.local_shape(ctx)) for spec in specs if spec is not item.spec) * wide
    rows = wide * ((item.element_size < wide) + filter_rows(config) + layout.weight_copies + item.spec.means)
    on_host = rule.host_state
    return _Weight(
        math.prod(item.spec.local_shape(ctx)),
        (rows, state) if on_host else (rows + state, 0),
        (0, other) if on_host else (other, 0),
    )


def state_bytes(
    parts: ModelParts, own: Sequence[StagePart], layout: PlannedLayout, ctx: ParallelContext | None = None
) -> StateBytes:
    """The state of the rank of ``ctx``, whose pipeline rank has the stages ``own``; without ``ctx``, of the fullest.

    ZeRO shares out masters and optimizer state (``--zero 2``: gradients too) over a parameter's replicas. All replicas
    have slices of the same length, which rules of whole matrices do not fill alike. Gaps in buckets count.
    """
    key = ("state", *_key(own, layout), layout.zero)
    if ctx is None and key in parts.measured:
        known: StateBytes = parts.measured[key]
        return known
    plan, at = stage_plan(parts, own, layout), layout.context() if ctx is None else ctx
    weights: dict[int, _Weight] = {}
    parameters, gradients = plan.alone, 0
    shares = {axis: [_Share() for _ in range(at.axis(axis).size)] for axis in _REPLICA_AXES}
    for bucket, held in plan.buckets:
        for item in held:
            if id(item) not in weights:
                weights[id(item)] = _weight(item, layout, at)
        weighed = [weights[id(item)] for item in held]
        elements = bucket.size if layout.zero else sum(weight.numel for weight in weighed)
        parameters += elements * held[0].element_size
        parameters += sum(weight.numel for weight, item in zip(weighed, held, strict=True) if item.spec.quantized)
        gradients += (bucket.slice_size if layout.zero > 1 else bucket.size) * _wide(held[0])
        _share_out(bucket, weighed, shares[bucket.axis], at.axis(bucket.axis).rank, layout.zero > 0)
    mine = [_fullest(shares[axis]) if ctx is None else shares[axis][ctx.axis(axis).rank] for axis in _REPLICA_AXES]
    state = StateBytes(
        parameters, gradients, sum(one.device for one in mine), plan.elements, sum(one.host for one in mine)
    )
    if ctx is None:
        parts.measured[key] = state
    return state


def checkpoint_bytes(parts: ModelParts, own: Sequence[StagePart], layout: PlannedLayout, *, held: bool = False) -> int:
    """What a rank that has the stages ``own`` writes of a checkpoint: of main weights and all that belongs to them, its
    share, as replicas share the writing with and without ZeRO. Random states and the like are left out.

    Args:
        held: what the rank has of all that instead: without ZeRO each replica has the whole.
    """
    at, total = layout.context(), 0.0
    plan = stage_plan(parts, own, layout)
    whole = held and not layout.zero
    for bucket, members in plan.buckets:
        for item in members:
            weight = _weight(item, layout, at)
            master = weight.numel * item.element_size if item.element_size == _wide(item) else 0
            replicas = 1 if whole else at.axis(bucket.axis).size
            total += (sum(weight.bytes_of(weight.numel)) + master) / replicas
    return round(total + plan.alone / (1 if held else at.dp_cp.size))


def _fullest(shares: Sequence[_Share]) -> _Share:
    return max(shares, key=lambda share: share.device)


def _share_out(
    bucket: BucketPlan, weighed: Sequence[_Weight], shares: Sequence[_Share], rank: int, sharded: bool
) -> None:
    """Adds what replicas keep of a bucket's parameters: what ``rank`` does or, of whole matrices, each."""
    for start, weight in zip(bucket.starts, weighed, strict=True):
        if not sharded:
            shares[rank].add(weight.bytes_of(weight.numel))
        elif bucket.whole:
            shares[start // max(bucket.slice_size, 1)].add(weight.bytes_of(weight.numel))
        else:
            low, high = range_in_slice(start, weight.numel, rank * bucket.slice_size, bucket.slice_size)
            shares[rank].add(weight.bytes_of(high - low))


def fullest_rank(parts: ModelParts, own: Sequence[StagePart], layout: PlannedLayout, rank: int) -> int:
    """Of the ranks that hold the stages of pipeline rank ``rank``, the one with most optimizer state, in the world."""
    first = rank * layout.stage_ranks
    if not any(bucket.whole for bucket, _ in stage_plan(parts, own, layout).buckets):
        return first
    ranks = range(first, first + layout.stage_ranks)
    return max(ranks, key=lambda one: state_bytes(parts, own, layout, layout.context(one)).optimizer)
