"""Documents behind each other in rows of one length, which do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.parallel.agree import reduced
from megaforge.parallel.context import ParallelContext

Tokens = tuple[int, ...]


class Document(Protocol):
    """
    Attributes:
        tokens: at least one.
    """

    @property
    def tokens(self) -> Tokens: ...


D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Packed(Generic[D]):
    """
    Attributes:
        places: of each document its row and the place of its first token there.
        rows: how many there are.
    """

    places: dict[D, tuple[int, int]]
    rows: int


def pack(documents: Iterable[D], length: int, what: str, shorter: str) -> Packed[D]:
    """Puts documents into rows, in their order; equal ones are there once.

    Args:
        what: they are, for the message: ``the agent sees {} tokens at once``.
        shorter: the flags that make them so.

    Raises:
        UserError: one is longer than a row.
    """
    places: dict[D, tuple[int, int]] = {}
    row = filled = 0
    for document in documents:
        if document in places:
            continue
        size = len(document.tokens)
        if size > length:
            raise UserError(f"--seq-length {length}: {what.format(size)}; give at least {size}, or a shorter {shorter}")
        if filled + size > length:
            row, filled = row + 1, 0
        places[document] = row, filled
        filled += size
    return Packed(places, row + 1)


def rounded(rows: int) -> int:
    """A number of rows of which there are few, at most a quarter larger: what is made for a shape is kept."""
    unit = 1 << max(rows.bit_length() - 3, 0)
    return -(-rows // unit) * unit


def as_batch(packed: Packed[D], rows: int, length: int) -> Batch:
    """Micro-batch of ``rows`` [rows, length]: labels are the next tokens of a document, and none counts."""
    tokens, labels = np.zeros((2, rows, length), np.int64)
    starts, used = np.zeros((2, rows, length), np.bool_)
    ends = [0] * rows
    for document, (row, first) in packed.places.items():
        stop = first + len(document.tokens)
        tokens[row, first:stop] = document.tokens
        labels[row, first : stop - 1] = document.tokens[1:]
        starts[row, first], ends[row], used[row, first:stop] = True, stop, True
    for row, end in enumerate(ends):
        if end < length:
            starts[row, end] = True
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.zeros(rows, length),
        document_start=torch.from_numpy(starts),
        used=torch.from_numpy(used),
    )


def samples_of(batch: Batch) -> list[int]:
    """The numbers of a micro-batch's samples."""
    assert batch.samples is not None
    return [int(sample) for sample in batch.samples]


def of_whole(batches: Iterable[Batch], ctx: ParallelContext) -> list[Batch]:
    """Each says how many tokens those of all ranks have. Collective."""
    made = list(batches)
    tokens = reduced(ctx, sum(batch.tokens.numel() for batch in made), dist.ReduceOp.SUM)
    tokens //= ctx.world.size // ctx.dp.size
    return [replace(batch, tokens_of=tokens) for batch in made]


def stacked(rows: Sequence[Sequence[Tensor]], width: int, like: Tensor) -> Tensor:
    """[rows, width, ...] of tensors of one shape, as many in each row as there are; zeros behind them."""
    out = like.new_zeros(len(rows), width, *like.shape)
    for row, own in zip(out, rows, strict=True):
        if own:
            row[: len(own)] = torch.stack(list(own))
    return out
