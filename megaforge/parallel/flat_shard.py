"""The part of a parameter that one of its replicas keeps: a range of the flattened local tensor, known as boxes.

ZeRO cuts flat buffers without regard to the parameters in them, so that a rank holds any range of a parameter. A range
of an n-dimensional tensor is at most 2n - 1 boxes; as boxes it goes to a checkpoint, and comes back at any layout,
without ever being gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import Box, ParamSpec, spec_of


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """The elements [start, stop) of a row-major tensor, in order, as (first element, box): at most 2n - 1 of them.

    Every box is whole in all dimensions behind the first in which it is longer than one, so its elements are
    neighbours in memory.
    """
    if start >= stop:
        return
    if not shape:
        yield start, ()
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _within_row(shape, first, head, tail)
        return
    if head:
        yield from _within_row(shape, first, head, row)
        first += 1
    if first < last:
        yield first * row, ((first, last), *((0, size) for size in shape[1:]))
    if tail:
        yield from _within_row(shape, last, 0, tail)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    offset = row * math.prod(shape[1:])
    for first, box in flat_boxes(shape[1:], start, stop):
        yield offset + first, ((row, row + 1), *box)


@dataclass(frozen=True)
class FlatPiece:
    """One box of a flat share: where it lies in the global tensor, and how to see it in the share.

    Attributes:
        global_box: where it lies in the global tensor.
        first: index in the share of the first element of the run of neighbours that holds the box.
        run: shape of that run.
        inner_box: the box within the run.
    """

    global_box: Box
    first: int
    run: tuple[int, ...]
    inner_box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.global_box)

    def local_view(self, local: Tensor) -> Tensor:
        """The part of the share ``local`` [stop - start] that the piece names (a view)."""
        whole = local[self.first : self.first + math.prod(self.run)].view(self.run)
        return whole[tuple(slice(start, stop) for start, stop in self.inner_box)]


@dataclass(frozen=True)
class FlatShard:
    """Elements [start, stop) of this rank's flattened local tensor of the parameter ``spec``; none where equal.

    It answers what checkpoints, norms and optimizers ask of a :class:`ParamSpec`, and may stand in its place.
    """

    spec: ParamSpec
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The parameter's global name."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's global shape."""
        return self.spec.shape

    def local_shape(self, ctx: ParallelContext) -> tuple[int, ...]:
        """Shape of the share."""
        return (self.stop - self.start,)

    def is_first_copy(self, ctx: ParallelContext) -> bool:
        """Whether this rank counts the share: of the ranks along tp that hold a copy, the first. The replicas' shares
        are parts of one copy."""
        if self.spec.is_tied_copy:
            return False
        if self.spec.shard_dim is not None:
            return True
        return (ctx.tp if self.spec.expert_dim is None else ctx.etp).rank == 0

    def pieces(self, ctx: ParallelContext) -> tuple[FlatPiece, ...]:
        """The boxes of the global tensor that the share holds."""
        pieces = []
        held = self.spec.pieces(ctx)
        for first, box in flat_boxes(self.spec.local_shape(ctx), self.start, self.stop):
            run = tuple(stop - start for start, stop in box)
            for piece in held:
                common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.local_box, strict=True))
                if any(start >= stop for start, stop in common):
                    continue
                shift = [g - c for (g, _), (c, _) in zip(piece.global_box, piece.local_box, strict=True)]
                global_box = tuple((a + by, b + by) for (a, b), by in zip(common, shift, strict=True))
                inner = tuple((a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
                pieces.append(FlatPiece(global_box, first - self.start, run, inner))
        return tuple(pieces)


def optimizer_shard(parameter: nn.Parameter) -> ParamSpec | FlatShard:
    """What this rank updates, counts and stores of ``parameter``: all of its local tensor or, where its replicas have
    shared it out (:class:`megaforge.parallel.zero.ShardedParameters`), a range of it. ``main_grad`` is of that part."""
    share = getattr(parameter, "share", None)
    return share if isinstance(share, FlatShard) else spec_of(parameter)


# A tensor as checkpoints name it: its key, how it is split (None: every rank has all of it), and this rank's part.
Entry = tuple[str, ParamSpec | FlatShard | None, Tensor]
