"""Digests of tensors: the same numbers at every layout, of all their elements, each counted once.

The exact digest of a tensor is the sum, modulo 2^64, of a hash of each element's bits and its place in the global
tensor: sums of integers have no order, so that ranks add up theirs, however the tensor is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.optim.main_parameters import MainParameter, MainParameters
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.param_spec import Box

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes of an element
_FACTORS = (-7046029254386353131, -4658895280553007687)  # of splitmix64, as signed numbers
_AT_ONCE = 1 << 22  # elements hashed together: each takes three numbers of 64 bits meanwhile


class Digest(NamedTuple):
    """Of one tensor: the sum of its elements' hashes, as an unsigned number, and its 2-norm."""

    bits: int
    norm: float


@torch.no_grad()
def digests(main: MainParameters, ctx: ParallelContext, of: Callable[[MainParameter], Tensor]) -> dict[str, Digest]:
    """Of what ``of`` takes from each trained parameter (its master, its gradient), by name. Collective."""
    own: dict[str, tuple[int, float]] = {}
    for one in main.trained:
        held = optimizer_shard(one.parameter)
        if not held.is_first_copy(ctx):
            continue
        bits, squares, local = 0, 0.0, of(one).detach()
        for piece in held.pieces(ctx):
            view = piece.local_view(local)
            bits += hashed(view, piece.global_box, held.shape)
            squares += float(view.square().sum(dtype=torch.float64))
        own[held.name] = bits, squares
    return added_up(own, ctx)


def added_up(own: Mapping[str, tuple[int, float]], ctx: ParallelContext) -> dict[str, Digest]:
    """Digests from what each rank counts of tensors: sums of hashes and of squares, by name. Collective."""
    found: dict[str, tuple[int, float]] = {}
    for rank in exchange(ctx, own):
        for name, (bits, squares) in rank.items():
            before = found.get(name, (0, 0.0))
            found[name] = before[0] + bits, before[1] + squares
    return {name: Digest(bits % 2**64, math.sqrt(squares)) for name, (bits, squares) in found.items()}


def hashed(view: Tensor, box: Box, shape: Iterable[int]) -> int:
    """The sum of the hashes of a part of a tensor of this ``shape``.

    Args:
        view: the part, of any floating type.
        box: where it lies in the tensor.
    """
    if not view.numel():
        return 0
    sizes, total = tuple(shape), 0
    if not sizes:
        view, box, sizes = view.view(1), ((0, 1),), (1,)
    rows = max(1, _AT_ONCE // max(1, view.numel() // view.shape[0]))
    for start in range(0, view.shape[0], rows):
        part = view[start : start + rows]
        index = torch.zeros((), dtype=torch.int64, device=view.device)
        for dim, (size, (first, _)) in enumerate(zip(sizes, box, strict=True)):
            here = first + (start if dim == 0 else 0)
            along = torch.arange(here, here + part.shape[dim], device=view.device)
            index = index * size + along.view(-1, *[1] * (len(sizes) - 1 - dim))
        total += int(_hashes(part, index).sum())
    return total % 2**64


def _hashes(part: Tensor, index: Tensor) -> Tensor:
    words = part.contiguous().view(_WORDS[part.element_size()]).to(torch.int64)
    mixed = (words ^ (index * _FACTORS[0])) * _FACTORS[1]
    mixed ^= mixed >> 31
    return mixed * _FACTORS[0]


@torch.no_grad()
def hashed_rows(rows: Tensor) -> Tensor:
    """int64: the sum, modulo 2^64, of hashes of each element and its place in its row [..., n], in whatever order rows
    are; on the device of ``rows``."""
    return _hashes(rows, torch.arange(rows.shape[-1], device=rows.device)).sum()
