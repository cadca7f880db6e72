"""Long sequences shared by the ranks of cp: which tokens a rank holds, and how what they need of others is fetched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.mappings import gather_from_context_parallel


@dataclass(frozen=True)
class ContextShards:
    """A sequence is cut into 2 cp equal chunks and rank r holds chunks r and 2 cp - 1 - r, in this order ("zigzag").

    In causal attention late queries see more keys than early ones; a late chunk with an early one makes every rank's
    work the same (Megatron-LM's load-balanced context parallelism). At cp 1 the whole sequence is one chunk.
    """

    axis: Axis = Axis("cp")

    @property
    def chunks(self) -> tuple[int, ...]:
        """The numbers of this rank's chunks, in the order in which it holds them."""
        if self.axis.size == 1:
            return (0,)
        return self.axis.rank, 2 * self.axis.size - 1 - self.axis.rank

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's chunks of ``x``, which is whole along ``dim``.

        Raises:
            ValueError: ``dim`` does not divide into 2 cp chunks.
        """
        if self.axis.size == 1:
            return x
        if x.shape[dim] % (2 * self.axis.size):
            raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by 2 x cp = {2 * self.axis.size}")
        pieces = x.chunk(2 * self.axis.size, dim)
        return torch.cat([pieces[number] for number in self.chunks], dim)

    def gather(self, x: Tensor) -> Tensor:
        """[s / cp, ...], this rank's chunks -> [s, ...], all chunks in order; differentiable."""
        return gather_from_context_parallel(x, self.axis)

    def before(self, ends: Tensor) -> Tensor:
        """What the chunk before each of this rank's chunks ended with; differentiable.

        Args:
            ends: [chunks of this rank, ...], what each of them ends with.

        Returns:
            The same shape; zero for the first chunk of the sequence.
        """
        if self.axis.size == 1:
            return torch.zeros_like(ends)
        every = self.gather(ends)
        shifted = torch.cat([torch.zeros_like(every[:1]), every[:-1]])
        return torch.stack([shifted[number] for number in self.chunks])
