"""Who sees whom in causal attention, without a mask: rows of queries and of the keys that they may see.

A segment is six numbers: the sequence of the batch, the first query, how many, the first key, how many, and how far
ahead the queries are: query i of a segment sees its keys 0 to i + ahead, as far as there are any. A document is a
segment; so are tokens that continue a cache, and the part of a document in one rank's queries and another's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FEW = 8  # queries from which keys that are cached are worth laying out for a kernel
T = TypeVar("T")


class Plans(Generic[T]):
    """What a kernel derives from segments, made once for as long as they live: all layers are given the same ones."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, segments: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave for ``segments`` and ``key``, now or before."""
        plans = self._known.setdefault(segments, {})
        if key not in plans:
            plans[key] = make()
        return cast(T, plans[key])


def documents_of(ids_BS: Tensor, offset: int = 0, padding_B: Tensor | None = None) -> Tensor:
    """Where documents are.

    Args:
        ids_BS: int64 [b, s], the document of each token.
        offset: tokens of each sequence before these, of their first document.
        padding_B: int64 [b], places among those that belong to no document.

    Returns:
        int64 [n, 3] in host memory: sequence, first place, and the place after the last.
    """
    ids = ids_BS.cpu()
    batch, length = ids.shape
    start = torch.ones(batch, length, dtype=torch.bool)
    start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sequence, begin = start.nonzero().unbind(1)
    end = torch.full_like(begin, length)
    follows = sequence[1:] == sequence[:-1]
    end[:-1] = torch.where(follows, begin[1:], end[:-1])
    before = torch.zeros_like(begin) if padding_B is None else padding_B.cpu()[sequence]
    begin = torch.where(begin == 0, before, begin + offset)
    return torch.stack([sequence, begin, end + offset], 1)


def segments_of(documents: Tensor, queries: range, keys: range) -> Tensor:
    """What queries at some places see of keys at some places.

    Args:
        documents: int64 [n, 3] of :func:`documents_of`.
        queries, keys: places in the sequences, of which the tensors hold these alone.

    Returns:
        int64 [m, 6], counted from the first of these queries and keys.
    """
    sequence, begin, end = documents.unbind(1)
    first, last = begin.clamp(min=queries.start), end.clamp(max=queries.stop)
    key, key_end = begin.clamp(min=keys.start), last.clamp(max=keys.stop)
    rows = [sequence, first - queries.start, last - first, key - keys.start, key_end - key, first - key]
    return torch.stack(rows, 1)[(last > first) & (key_end > key)].contiguous()


def whole(batch: int, length: int) -> Tensor:
    """The segments of ``batch`` sequences of one document each."""
    return torch.tensor([[sequence, 0, length, 0, length, 0] for sequence in range(batch)], dtype=torch.long).view(
        -1, 6
    )


def ranges_of(segments: Tensor, batch: int, length: int) -> Tensor:
    """The first key that each query sees and the one after the last: int64 [2, ``batch``, ``length``]; (0, 0) for a
    query that sees nothing."""
    ranges = torch.zeros(2, batch * length, dtype=torch.long)
    sequence, query, rows, key, keys, ahead = segments.unbind(1)
    before = (rows.cumsum(0) - rows).repeat_interleave(rows)
    number = torch.arange(int(rows.sum())) - before  # of a query in its segment
    places = (sequence * length + query).repeat_interleave(rows) + number
    seen = (number + ahead.repeat_interleave(rows) + 1).clamp(min=0).minimum(keys.repeat_interleave(rows))
    first = key.repeat_interleave(rows)
    ranges[0, places], ranges[1, places] = first, first + seen
    return ranges.view(2, batch, length)
