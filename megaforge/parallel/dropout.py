"""Dropout (Srivastava et al., JMLR 15, 2014) whose masks are the same at every layout.

A mask is a function of (seed, sample, place in its sequence, layer, site, element) alone: a 64-bit word for four
neighbouring elements, 16 bits each, by the counter-based generator SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). No state is kept, saved or resharded, and no mask is kept for the
backward pass, which makes it again. Integer arithmetic is exact, so a GPU has the masks of a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.region import TensorParallelRegion

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # odd, of SplitMix64
_WORD, _VALUES = 4, 1 << 16  # elements of a word, values of an element's bits
# Where in a block a mask belongs; the embedding is its own.
EMBEDDING, PROBABILITIES, UPDATES = 0, 1, 2


def _shifted(x: Tensor, bits: int) -> Tensor:
    """As if ``x`` had no sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer; overwrites ``x``, int64."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def _with(key: Tensor, value: Tensor | int) -> Tensor:
    """The key of (``key``, ``value``), where values count from -1."""
    return _mixed(key ^ ((value + 1) * torch.full((), _STEP, device=key.device)))


def threshold_of(rate: float) -> int:
    """How many of an element's 65,536 values drop it."""
    return min(round(rate * _VALUES), _VALUES - 1)


def scale_of(rate: float) -> float:
    """What is left is multiplied by this."""
    return _VALUES / (_VALUES - threshold_of(rate))


def kept(rows: Tensor, rate: float, end: int, start: int = 0) -> Tensor:
    """Which of the elements ``start`` to ``end`` of each row stay.

    Args:
        rows: int64 [...], the rows' keys.

    Returns:
        Bool [..., end - start].
    """
    first = start // _WORD
    counts = torch.arange(first + 1, -(-end // _WORD) + 1, device=rows.device).mul_(_STEP)
    words = _mixed(rows.unsqueeze(-1) + counts)
    return (
        words.view(torch.int16)[..., start - first * _WORD : end - first * _WORD] >= threshold_of(rate) - _VALUES // 2
    )


class _Dropped(torch.autograd.Function):
    """Elements of each row are kept, times the scale, or zero. Backward: the same of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, rate: float, start: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.rate, ctx.start = rate, start
        return _drop(x, rows, rate, start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return _drop(grad, rows, ctx.rate, ctx.start), None, None, None


def _drop(x: Tensor, rows: Tensor, rate: float, start: int) -> Tensor:
    return (x * scale_of(rate)).masked_fill_(~kept(rows, rate, start + x.shape[-1], start), 0)


def drop_inputs(x: Tensor, rows: Tensor, rate: float, start: int = 0) -> Tensor:
    """Elements of ``x`` [..., n] are kept, times the scale, or zero.

    Args:
        rows: int64 [...], a key of each row (:meth:`Dropout.rows`).
        start: place of the first element of ``x`` in its row, of which other ranks have the rest.
    """
    out: Tensor = _Dropped.apply(x, rows, rate, start)
    return out


@dataclass(frozen=True)
class DropoutRates:
    """What the flags ask for.

    Attributes:
        hidden: share of the embedding's and of each layer's output that is dropped.
        attention: likewise of attention's probabilities.
        seed: the run's.
    """

    hidden: float
    attention: float
    seed: int

    def of(self, samples_B: Tensor, places_S: Tensor) -> Dropout:
        """That of a micro-batch.

        Args:
            samples_B: int64 [b], each sequence's number in the whole run.
            places_S: int64 [s], where in its sequence each of this rank's tokens is.
        """
        seed = _with(torch.zeros((), dtype=torch.int64, device=places_S.device), self.seed % (1 << 62))
        return Dropout(self, _with(_with(seed, samples_B), places_S.unsqueeze(1)))


class Dropout:
    """The masks of one micro-batch in training."""

    def __init__(self, rates: DropoutRates, rows_SB: Tensor) -> None:
        """``rows_SB``: int64 [s, b], a key of each token's sample and place."""
        self.rates, self._rows_SB = rates, rows_SB

    def select(self, indices_SB: Tensor, shards: ContextParallelShard) -> Dropout:
        """That of some tokens of each whole sequence, int64 [k, b], as far as this rank holds them of ``shards``."""
        some = copy.copy(self)
        some._rows_SB = shards.take(shards.gather(self._rows_SB).gather(0, indices_SB), 0)
        return some

    def rows(self, layer: int, site: int) -> Tensor:
        """A key of each token [s, b] for the block and the place in it."""
        return _with(_with(self._rows_SB, layer), site)

    def hidden(self, x: Tensor, layer: int, site: int, region: TensorParallelRegion) -> Tensor:
        """Residual stream or an update of it [s(/tp), b, h] -> the same shape.

        Args:
            layer: the block, from 0; -1 for the embedding.
            site: where in the block.
        """
        if not self.rates.hidden:
            return x
        return _Dropped.apply(x, region.own(self.rows(layer, site)), self.rates.hidden, 0)

    def attention_rows(self, layer: int, heads: range) -> Tensor:
        """Keys of the rows of attention's probabilities: int64 [b, heads, s]; their elements are the places of all
        keys of the sequence."""
        numbers = torch.arange(heads.start, heads.stop, device=self._rows_SB.device)
        rows_BS = self.rows(layer, PROBABILITIES).t()
        return _with(rows_BS.unsqueeze(1), numbers[:, None])
