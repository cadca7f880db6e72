"""The logical matrices of parameters, as declared, and who orthogonalizes those that are split over tp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.optim.main_parameters import MainParameter
from megaforge.parallel.balance import balanced
from megaforge.parallel.collectives import all_gather_single, max_over
from megaforge.parallel.context import Axis, ParallelContext
from megaforge.parallel.param_spec import ParamSpec, ShardPiece

WholeMatrices = Callable[[Tensor], Tensor]  # [b, rows, columns] -> the same shape


@dataclass(frozen=True)
class MatrixKind:
    """What matrices have in common that are worked on at once.

    Attributes:
        rows, columns: of the whole matrix.
        split: 0 where its rows are split over ``axis``, 1 where its columns are, None where this rank has all of it.
        axis: name of the axis.
    """

    rows: int
    columns: int
    split: int | None
    axis: str

    @property
    def short(self) -> int:
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        return max(self.rows, self.columns)

    @property
    def long_is_split(self) -> bool:
        """Whether the longer side, or one of two equal ones, is split."""
        return self.split is not None and (self.rows, self.columns)[self.split] == self.long


def kind_of(spec: ParamSpec, piece: ShardPiece, ctx: ParallelContext) -> MatrixKind:
    """Of the matrices in a piece of a parameter: the last two dimensions are a matrix, one before them counts matrices
    (experts)."""
    axis = ctx.axis(spec.shard_axis)
    sides, split = list(piece.shape[-2:]), None
    if spec.shard_dim is not None and axis.size > 1 and spec.shard_dim >= len(spec.shape) - 2:
        split = spec.shard_dim - (len(spec.shape) - 2)
        sides[split] *= axis.size
    return MatrixKind(sides[0], sides[1], split, axis.name)


@dataclass(frozen=True)
class Stack:
    """The local parts of all matrices of a kind, in pieces of parameters.

    Attributes:
        pieces: the parameter, and its piece.
    """

    kind: MatrixKind
    pieces: tuple[tuple[MainParameter, ShardPiece], ...]

    def views(self, of: Callable[[MainParameter], Tensor]) -> list[Tensor]:
        """``of`` each parameter [its local shape], the matrices of the piece: [b, rows, columns] local, views."""
        found = []
        for main, piece in self.pieces:
            view = piece.local_view(main.in_shape(of(main)))
            found.append(view.unsqueeze(0) if view.dim() == 2 else view.flatten(0, -3))
        return found


def stacks_of(parameters: Sequence[MainParameter], ctx: ParallelContext) -> list[Stack]:
    """The matrices of ``parameters``: each expert's, and each fused part (q|k|v, gate|up), by kind. In an order that is
    the same on all ranks that hold shards of them."""
    found: dict[MatrixKind, list[tuple[MainParameter, ShardPiece]]] = {}
    for main in parameters:
        for piece in main.spec.pieces(ctx):
            found.setdefault(kind_of(main.spec, piece, ctx), []).append((main, piece))
    return [Stack(kind, tuple(pieces)) for kind, pieces in found.items()]


def in_batches(stacks: Sequence[Stack], most: int) -> list[list[Stack]]:
    """``stacks`` in batches of at most ``most`` elements of this rank, or of a single piece that is larger; the same
    ones on all ranks that hold shards of them."""
    batches: list[dict[MatrixKind, list[tuple[MainParameter, ShardPiece]]]] = []
    filled = most
    for stack in stacks:
        for main, piece in stack.pieces:
            size = math.prod(piece.shape)
            if filled + size > most:
                batches.append({})
                filled = 0
            batches[-1].setdefault(stack.kind, []).append((main, piece))
            filled += size
    return [[Stack(kind, tuple(pieces)) for kind, pieces in batch.items()] for batch in batches]


def gathered(stacks: Sequence[tuple[MatrixKind, Tensor]], axis: Axis, whole: Sequence[WholeMatrices]) -> list[Tensor]:
    """Every rank of ``axis`` makes all matrices whole, works on all of them, and keeps its own part of each."""
    flat = torch.cat([part.reshape(-1) for _, part in stacks])
    everything = flat.new_empty(axis.size * flat.numel())
    all_gather_single(everything, flat, group=axis.group)
    found, start = [], 0
    for (kind, part), work in zip(stacks, whole, strict=True):
        ranks = everything.view(axis.size, -1)[:, start : start + part.numel()].view(axis.size, *part.shape)
        start += part.numel()
        dim = 1 + (kind.split or 0)
        full = torch.cat(ranks.unbind(), dim)
        found.append(work(full).chunk(axis.size, dim)[axis.rank])
    return found


@dataclass(frozen=True)
class Job:
    """What is done with the matrices of a stack that is split over an axis.

    Attributes:
        part: [b, rows, columns], this rank's.
        whole: what is done to whole matrices.
        of_gram: where given, the Gram matrices along the split side are enough: [b, m, m] of matrices divided by their
            norms -> what each is multiplied by.
        cost: of one matrix, for its owner.
        least_norm: see :func:`megaforge.kernels.newton_schulz.newton_schulz`.
    """

    kind: MatrixKind
    part: Tensor
    whole: WholeMatrices
    of_gram: WholeMatrices | None
    cost: float
    least_norm: float


def shared(jobs: Sequence[Job], axis: Axis) -> list[Tensor]:
    """Each matrix has an owner among the ranks of ``axis``, by cost. It gets the parts of the matrix, works on all of
    it and sends the parts back; or it gets the Gram matrices of the parts, [short, short] each, adds them up and sends
    back the one matrix by which every rank multiplies its part. Two exchanges in all."""
    scaled, scales = _scaled(jobs, axis)
    payloads = [part if job.of_gram is None else _gram(job.kind, part) for job, part in zip(jobs, scaled, strict=True)]
    owners = owners_of([(job.cost, len(job.part)) for job in jobs], axis.size)
    arrived = _send(payloads, owners, axis)
    replies = [
        _reply(job, own, axis) if job.of_gram is None else _multiplier(job, own, scale[owner == axis.rank])
        for job, own, owner, scale in zip(jobs, arrived, owners, scales, strict=True)
    ]
    back = _send_back(replies, payloads, owners, axis)
    return [
        got if job.of_gram is None else _multiplied(job.kind, part, got)
        for job, part, got in zip(jobs, scaled, back, strict=True)
    ]


def owners_of(costs: Sequence[tuple[float, int]], ranks: int) -> list[Tensor]:
    """For stacks of (cost of a matrix, number of matrices) the rank of each matrix."""
    found = torch.tensor(balanced([cost for cost, number in costs for _ in range(number)], ranks), dtype=torch.int64)
    return list(found.split([number for _, number in costs]))


def _scaled(jobs: Sequence[Job], axis: Axis) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of which Gram matrices are made, divided by their largest element, so that squares neither overflow nor
    vanish; and these elements [b]."""
    largest = [job.part.new_ones(len(job.part)) if job.of_gram is None else job.part.abs().amax((1, 2)) for job in jobs]
    if any(job.of_gram is not None for job in jobs):
        scales = list(max_over(torch.cat(largest), axis).split([len(one) for one in largest]))
    else:
        scales = largest
    scales = [torch.where(one == 0, 1.0, one) for one in scales]
    return [
        job.part if job.of_gram is None else job.part / scale.view(-1, 1, 1)
        for job, scale in zip(jobs, scales, strict=True)
    ], scales


def _gram(kind: MatrixKind, part: Tensor) -> Tensor:
    """Of matrices whose split side is the longer one, [b, short, short]."""
    return torch.bmm(part.mT, part) if kind.split == 0 else torch.bmm(part, part.mT)


def _multiplied(kind: MatrixKind, part: Tensor, by: Tensor) -> Tensor:
    return torch.bmm(part, by) if kind.split == 0 else torch.bmm(by, part)


def _reply(job: Job, parts: Tensor, axis: Axis) -> Tensor:
    """[ranks, own, ...], the parts of every rank -> what each gets back, in the same shape."""
    dim = 1 + (job.kind.split or 0)
    if not parts.shape[1]:
        return parts
    return torch.stack(job.whole(torch.cat(parts.unbind(), dim)).chunk(axis.size, dim))


def _multiplier(job: Job, grams: Tensor, scale: Tensor) -> Tensor:
    """[ranks, own, m, m], each rank's Gram matrices of what was divided by ``scale`` [own] -> the same for all."""
    if not grams.shape[1]:
        return grams
    assert job.of_gram is not None
    gram = grams.sum(0)
    norm = gram.diagonal(dim1=1, dim2=2).sum(-1).double().sqrt()
    divisor = torch.maximum(norm, job.least_norm / scale.double()).view(-1, 1, 1)
    by = job.of_gram((gram / divisor.square()).to(gram.dtype)) / divisor
    return by.to(gram.dtype).expand_as(grams)


def _send(payloads: Sequence[Tensor], owners: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """What is for each owner; back come, of each stack, [ranks, own, ...] of the matrices that this rank owns."""
    out = torch.cat(
        [p[o == rank].reshape(-1) for rank in range(axis.size) for p, o in zip(payloads, owners, strict=True)]
    )
    sent = [sum(_numbers(p, o, rank) for p, o in zip(payloads, owners, strict=True)) for rank in range(axis.size)]
    arrived = out.new_empty(axis.size * sent[axis.rank])
    dist.all_to_all_single(arrived, out, [sent[axis.rank]] * axis.size, sent, group=axis.group)
    by_rank, found, start = arrived.view(axis.size, -1), [], 0
    for p, o in zip(payloads, owners, strict=True):
        numbers = _numbers(p, o, axis.rank)
        found.append(by_rank[:, start : start + numbers].reshape(axis.size, -1, *p.shape[1:]))
        start += numbers
    return found


def _send_back(
    replies: Sequence[Tensor], payloads: Sequence[Tensor], owners: Sequence[Tensor], axis: Axis
) -> list[Tensor]:
    """:func:`_send` the other way round: each stack as ``payloads`` has it."""
    out = torch.cat([reply.reshape(axis.size, -1) for reply in replies], 1).reshape(-1)
    sent = out.numel() // axis.size
    received = [sum(_numbers(p, o, rank) for p, o in zip(payloads, owners, strict=True)) for rank in range(axis.size)]
    arrived = out.new_empty(sum(received))
    dist.all_to_all_single(arrived, out, received, [sent] * axis.size, group=axis.group)
    found, start = [torch.empty_like(p) for p in payloads], 0
    for rank in range(axis.size):
        for into, o in zip(found, owners, strict=True):
            numbers = _numbers(into, o, rank)
            into[o == rank] = arrived[start : start + numbers].view(-1, *into.shape[1:])
            start += numbers
    return found


def _numbers(stack: Tensor, owner: Tensor, rank: int) -> int:
    """Elements of the matrices of ``stack`` that ``rank`` owns."""
    return int((owner == rank).sum()) * (stack[0].numel() if len(stack) else 0)
