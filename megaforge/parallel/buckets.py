"""Parameters side by side in flat buffers: what is communicated at once, and which slice of it each replica keeps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.param_spec import ParamSpec, named_specs

# Elements to which parameters and slices are aligned in flat buffers: 128 bytes of the narrowest type, a line of a
# GPU's cache. Vectorised kernels and TMA ask for 16 bytes, which an odd parameter in front would break.
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters of one dtype and one set of replicas, laid out one after the other, each from a multiple of
    :data:`ALIGNMENT` elements on. What fills the gaps belongs to nobody and is zero.

    Attributes:
        parameters: in the order in which the backward pass is likely to finish them.
        starts: index of the first element of each.
        size: elements of a flat buffer; divides by the number of replicas.
        replicas: the ranks that hold copies.
    """

    parameters: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]
    size: int
    replicas: Axis

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
        """Elements that each replica keeps when the bucket is shared out."""
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
        ranges = []
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            low = min(max(begin - start, 0), parameter.numel())
            ranges.append((low, min(max(begin + self.slice_size - start, low), parameter.numel())))
        return ranges

    def own_views(self, own: Tensor) -> list[Tensor]:
        """Each parameter's range (see :meth:`own_ranges`) in a buffer [slice_size] of this rank's slice."""
        begin = self.replicas.rank * self.slice_size
        return [
            own.narrow(0, max(start + low - begin, 0) if low < high else 0, high - low)
            for start, (low, high) in zip(self.starts, self.own_ranges(), strict=True)
        ]


def aligned(elements: int, slices: int = 1) -> int:
    """Room that ``elements`` take in a flat buffer that is cut into ``slices``."""
    unit = slices * ALIGNMENT
    return -(-elements // unit) * unit


def main_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which gradients of ``parameter`` are summed and its master is kept."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def make_bucket_groups(chunks: Sequence[nn.Module], ctx: ParallelContext, bucket_size: int) -> list[list[Bucket]]:
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
    return [_make_buckets(trained, ctx, bucket_size) for trained in bucket_groups]


def _make_buckets(
    trained: list[tuple[ParamSpec, nn.Parameter]], ctx: ParallelContext, bucket_size: int
) -> list[Bucket]:
    """Packs parameters, given in module order, into buckets of at most ``bucket_size`` elements, in the order in which
    the backward pass should complete them; the same on every rank of a pipeline stage.

    Parameters are taken in reverse module order, which is about the order of their gradients (Li et al.,
    arXiv 2006.15704). Each kind (replicas, dtype) fills buckets of its own, and a bucket is due with its last
    parameter. One larger than ``bucket_size`` stands alone, and so does one with the attribute ``alone_in_bucket``:
    a tied weight whose copies on two pipeline stages must be cut alike.
    """
    runs: dict[tuple[str, torch.dtype], list[list[tuple[int, nn.Parameter]]]] = defaultdict(list)
    filled: dict[tuple[str, torch.dtype], float] = {}
    for due, (spec, parameter) in enumerate(reversed(trained)):
        kind = (spec.replica_axis, parameter.dtype)
        alone = getattr(parameter, "alone_in_bucket", False)
        size = math.inf if alone else filled.get(kind, math.inf) + parameter.numel()
        if size > bucket_size:
            runs[kind].append([])
            size = math.inf if alone else parameter.numel()
        runs[kind][-1].append((due, parameter))
        filled[kind] = size
    ordered = sorted((run[-1][0], axis, run) for (axis, _), kinds in runs.items() for run in kinds)
    return [_lay_out([parameter for _, parameter in run], ctx.axis(axis)) for _, axis, run in ordered]


def _lay_out(parameters: list[nn.Parameter], replicas: Axis) -> Bucket:
    starts, size = [], 0
    for parameter in parameters:
        starts.append(size)
        size += aligned(parameter.numel())
    return Bucket(tuple(parameters), tuple(starts), aligned(size, replicas.size), replicas)
