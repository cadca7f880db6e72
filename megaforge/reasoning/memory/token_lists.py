"""Lists of tokens of any lengths, as two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor


def joined(lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All tokens behind each other, int64 [n], and how many each list has, int64."""
    flat = list(chain.from_iterable(lists))
    return torch.tensor(flat, dtype=torch.long), torch.tensor([len(one) for one in lists], dtype=torch.long)


def split(flat: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    """The opposite."""
    tokens = flat.tolist()
    return [tuple(tokens[start:stop]) for start, stop in pairwise(accumulate(lengths.tolist(), initial=0))]
