"""Parameters side by side in flat buffers: what is communicated at once, and which slice of it each replica keeps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaforge.parallel.balance import balanced
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.param_spec import ParamSpec, named_specs

# Elements to which parameters and slices are aligned in flat buffers: 128 bytes of the narrowest type, a line of a
# GPU's cache. Vectorised kernels and TMA ask for 16 bytes, which an odd parameter in front would break.
ALIGNMENT = 64
# Whole parameters a replica that a bucket waits for before it closes: with fewer, slices would differ much in length.
BALANCED = 4


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters of one dtype and one set of replicas in one flat buffer, each from a multiple of :data:`ALIGNMENT`
    elements on. What fills the gaps belongs to nobody and is zero.

    Attributes:
        parameters: in the order in which the backward pass is likely to finish them.
        starts: index of the first element of each.
        size: elements of a flat buffer; divisible by the number of replicas.
        replicas: the ranks that hold copies.
        coded: whether codes of the parameters travel in their place, see :class:`BucketPolicy`.
    """

    parameters: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]
    size: int
    replicas: Axis
    coded: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.parameters[0].dtype

    @property
    def main_dtype(self) -> torch.dtype:
        """Of their accumulated gradients and masters."""
        return main_dtype(self.parameters[0])

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def slice_size(self) -> int:
        """Elements that each replica keeps when the bucket is sharded."""
        return self.size // self.replicas.size

    def own_slice(self, flat: Tensor) -> Tensor:
        """This rank's slice of a flat buffer [size] (a view)."""
        return flat.narrow(0, self.replicas.rank * self.slice_size, self.slice_size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's place in a flat buffer [size], in its shape."""
        pairs = zip(self.parameters, self.starts, strict=True)
        return [flat.narrow(0, start, p.numel()).view(p.shape) for p, start in pairs]

    def own_ranges(self) -> list[tuple[int, int]]:
        """Of each parameter, flattened: the range [start, stop) within this rank's slice; start == stop for none."""
        begin = self.replicas.rank * self.slice_size
        pairs = zip(self.parameters, self.starts, strict=True)
        return [range_in_slice(start, p.numel(), begin, self.slice_size) for p, start in pairs]

    def own_views(self, own: Tensor) -> list[Tensor]:
        """Each parameter's range (see :meth:`own_ranges`) in a buffer [slice_size] of this rank's slice."""
        begin = self.replicas.rank * self.slice_size
        return [
            own.narrow(0, max(start + low - begin, 0) if low < high else 0, high - low)
            for start, (low, high) in zip(self.starts, self.own_ranges(), strict=True)
        ]


def range_in_slice(start: int, numel: int, begin: int, size: int) -> tuple[int, int]:
    """Of a parameter of ``numel`` elements from ``start`` on in a flat buffer: its range in the ``size`` elements from
    ``begin`` on; start == stop for none."""
    low = min(max(begin - start, 0), numel)
    return low, min(max(begin + size - start, low), numel)


def aligned(elements: int, slices: int = 1) -> int:
    """Room that ``elements`` take in a flat buffer that is cut into ``slices``."""
    unit = slices * ALIGNMENT
    return -(-elements // unit) * unit


def main_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which gradients of ``parameter`` are summed and its master is kept."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class BucketPolicy:
    """How parameters are laid out in buckets that are sharded over their replicas.

    Attributes:
        name: parameters of different policies never share a bucket.
        cost: what updating its shard of a whole parameter costs a rank. Given: each parameter lies in one replica's
            slice, so that this replica has it whole, and the slices cost about the same. None: slices cut parameters
            anywhere.
        coded: replicas get codes of updated parameters, not their values.
    """

    name: str = ""
    cost: Callable[[ParamSpec, ParallelContext], float] | None = None
    coded: bool = False


Policy = Callable[[ParamSpec], BucketPolicy]


def cut_anywhere(spec: ParamSpec) -> BucketPolicy:
    """The policy of updates that need not see a parameter whole."""
    return BucketPolicy()


def with_codes(policy: Policy) -> Policy:
    """``policy``, by which quantized parameters lie apart from others and travel as codes."""

    def coded(spec: ParamSpec) -> BucketPolicy:
        chosen = policy(spec)
        return replace(chosen, coded=True) if spec.quantized else chosen

    return coded


def make_bucket_groups(
    chunks: Sequence[nn.Module], ctx: ParallelContext, bucket_size: int, policy: Policy = cut_anywhere
) -> list[list[Bucket]]:
    """The buckets of each chunk of a model (the virtual pipeline stages of this rank), and last those of parameters
    that several chunks share, for which no single chunk can say when their gradients are complete."""
    owners: dict[int, set[int]] = defaultdict(set)
    for number, chunk in enumerate(chunks):
        for parameter in chunk.parameters():
            owners[id(parameter)].add(number)
    declared = [[(s, p) for s, p in named_specs(chunk) if p.requires_grad] for chunk in chunks]
    bucket_groups = [[(s, p) for s, p in chunk if len(owners[id(p)]) == 1] for chunk in declared]
    bucket_groups.append(
        list({id(p): (s, p) for chunk in declared for s, p in chunk if len(owners[id(p)]) > 1}.values())
    )
    return [_make_buckets(trained, ctx, bucket_size, policy) for trained in bucket_groups]


class Member(NamedTuple):
    """What decides where a parameter lies: its declaration, its elements on a rank, its type."""

    spec: ParamSpec
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True)
class BucketPlan:
    """A :class:`Bucket` before there are parameters.

    Attributes:
        members: places of its parameters among those that were planned.
        starts, size: see :class:`Bucket`.
        axis, replicas: the name of the axis whose ranks hold copies, and their number.
        whole: whether each parameter lies in one slice.
        coded: see :class:`Bucket`.
    """

    members: tuple[int, ...]
    starts: tuple[int, ...]
    size: int
    axis: str
    replicas: int
    whole: bool
    coded: bool = False

    @property
    def slice_size(self) -> int:
        return self.size // self.replicas


def _make_buckets(
    trained: list[tuple[ParamSpec, nn.Parameter]], ctx: ParallelContext, bucket_size: int, policy: Policy
) -> list[Bucket]:
    members = [Member(spec, parameter.numel(), parameter.dtype) for spec, parameter in trained]
    return [
        Bucket(
            tuple(trained[place][1] for place in plan.members),
            plan.starts,
            plan.size,
            ctx.axis(plan.axis),
            coded=plan.coded,
        )
        for plan in plan_buckets(members, ctx, bucket_size, policy)
    ]


def plan_buckets(
    members: Sequence[Member], ctx: ParallelContext, bucket_size: int, policy: Policy = cut_anywhere
) -> list[BucketPlan]:
    """Packs parameters, given in module order, into buckets of at most ``bucket_size`` elements, in the order in which
    the backward pass should complete them; the same on every rank of a pipeline stage.

    Parameters are taken in reverse module order, which is about the order of their gradients (Li et al.,
    arXiv 2006.15704). Each kind (replicas, dtype, policy) fills buckets of its own, and a bucket is due with its last
    parameter. One larger than ``bucket_size`` stands alone, and so does a tied matrix, whose copies on two pipeline
    stages must be cut alike. Where parameters stay whole, a bucket has room for :data:`BALANCED` a replica.
    """
    runs: dict[tuple[str, torch.dtype, BucketPolicy], list[list[int]]] = defaultdict(list)
    filled: dict[tuple[str, torch.dtype, BucketPolicy], float] = {}
    for place in reversed(range(len(members))):
        spec, numel, dtype = members[place]
        kind = (spec.replica_axis, dtype, policy(spec))
        alone = spec.tied_to is not None
        size = math.inf if alone else filled.get(kind, math.inf) + numel
        enough = kind[2].cost is None or not runs[kind] or len(runs[kind][-1]) >= BALANCED * ctx.axis(kind[0]).size
        if size > bucket_size and (enough or size == math.inf):
            runs[kind].append([])
            size = math.inf if alone else numel
        runs[kind][-1].append(place)
        filled[kind] = size
    ordered = sorted(((run, kind) for kind, all_of in runs.items() for run in all_of), key=lambda one: -one[0][-1])
    return [_lay_out(run, members, ctx, axis, policy) for run, (axis, _, policy) in ordered]


def _lay_out(
    run: Sequence[int],
    members: Sequence[Member],
    ctx: ParallelContext,
    axis: str,
    policy: BucketPolicy,
) -> BucketPlan:
    cost = policy.cost
    replicas = ctx.axis(axis).size
    sizes = [aligned(members[place].numel) for place in run]
    if cost is not None:
        starts, size = _lay_out_whole(sizes, [cost(members[place].spec, ctx) for place in run], replicas)
    else:
        *starts, size = accumulate(sizes, initial=0)
        size = aligned(size, replicas)
    return BucketPlan(tuple(run), tuple(starts), size, axis, replicas, cost is not None, policy.coded)


def _lay_out_whole(sizes: Sequence[int], costs: Sequence[float], replicas: int) -> tuple[list[int], int]:
    """Starts and size where each parameter lies whole in one slice, balanced by cost. All slices are as long as the
    longest."""
    length, offsets, slots = [0] * replicas, [], balanced(costs, replicas, sizes)
    for slot, size in zip(slots, sizes, strict=True):
        offsets.append(length[slot])
        length[slot] += size
    starts = [slot * max(length) + offset for slot, offset in zip(slots, offsets, strict=True)]
    return starts, replicas * max(length)
