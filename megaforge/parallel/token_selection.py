"""Some tokens of each sequence as sequences of their own, at any layout: how ranks hand them over, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.mappings import gather_from_sequence_parallel
from megaforge.parallel.region import TensorParallelRegion


class TokenSelection:
    """The chosen tokens of each sequence, in order. A layer sees them as sequences of k tokens, which ranks share as
    they share whole ones (:class:`ContextParallelShard`, then ``--sequence-parallel``): which rank has a token there
    depends on how many were chosen before it, so tokens travel.

    Where ranks share sequences, all get whole ones for a moment (forward an all-gather, backward a reduce-scatter), and
    keep what is theirs.

    Attributes:
        indices_SB: int64 [k, b], places in each whole sequence, in ascending order.
    """

    def __init__(
        self,
        indices_SB: Tensor,
        length: int,
        region: TensorParallelRegion,
        shards: ContextParallelShard,
        counts_B: Tensor | None = None,
    ) -> None:
        """
        Args:
            length: tokens of each whole sequence.
            counts_B: int64 [b], of how many tokens of each sequence what a layer makes is wanted: what is behind them
                fills up. None: of all.
        """
        self.indices_SB, self._region, self._shards = indices_SB, region, shards
        rank = torch.arange(len(indices_SB), device=indices_SB.device)[:, None].expand_as(indices_SB)
        if counts_B is not None:
            rank = rank.masked_fill(rank >= counts_B, -1)
        nowhere = rank.new_full((length, indices_SB.shape[1]), -1)
        # Of each of this rank's tokens on the residual stream its place among the chosen; -1: it is none of them.
        self._rank_SB = region.own(shards.take(nowhere.scatter(0, indices_SB, rank), 0))

    @property
    def chosen_SB(self) -> Tensor:
        """Bool [s(/tp), b]: which of this rank's tokens on the residual stream were chosen."""
        return self._rank_SB >= 0

    def take(self, x: Tensor) -> Tensor:
        """Residual stream [s(/tp), b, h] -> that of the chosen tokens [k(/tp), b, h]."""
        return self._region.own(self.take_inside(self._gathered(x)))

    def take_inside(self, x: Tensor) -> Tensor:
        """What is inside a tensor-parallel region [s, b, ...] -> that of the chosen tokens [k, b, ...]."""
        return self._shards.take(_rows(self._shards.gather(x), self.indices_SB), 0)

    def put(self, x: Tensor) -> Tensor:
        """Residual stream of the chosen tokens [k(/tp), b, h] -> that of all [s(/tp), b, h]; for the others it is
        anything that is finite."""
        return _rows(self._shards.gather(self._gathered(x)), self._rank_SB.clamp(min=0))

    def _gathered(self, x: Tensor) -> Tensor:
        return gather_from_sequence_parallel(x, self._region.axis) if self._region.sequence_parallel else x


def _rows(x: Tensor, places_SB: Tensor) -> Tensor:
    """Rows of each sequence: [n, b, ...] and int64 [k, b] -> [k, b, ...]."""
    index = places_SB.view(*places_SB.shape, *(1,) * (x.dim() - 2))
    return x.gather(0, index.expand(*places_SB.shape, *x.shape[2:]))
