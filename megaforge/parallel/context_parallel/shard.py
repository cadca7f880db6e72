"""Long sequences shared by the ranks of cp: which tokens a rank holds, and how what they need of others is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.parallel.context import Axis
from megaforge.parallel.mappings import gather_from_context_parallel


@dataclass(frozen=True)
class ContextParallelShard:
    """A sequence is cut into 2 cp equal chunks and rank r holds chunks r and 2 cp - 1 - r, in this order ("zigzag").

    In causal attention late queries see more keys than early ones; a late chunk with an early one makes every rank's
    work the same (Megatron-LM's load-balanced context parallelism). At cp 1 the whole sequence is one chunk.
    """

    axis: Axis = Axis("cp")
    comm_type: str = "allgather"  # how attention gets other ranks' keys and values, as --cp-comm-type

    @property
    def chunks(self) -> tuple[int, ...]:
        """The numbers of this rank's chunks, in the order in which it holds them."""
        return self.chunks_of(self.axis.rank)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The numbers of the chunks of ``rank``, in the order in which it holds them."""
        return (0,) if self.axis.size == 1 else (rank, 2 * self.axis.size - 1 - rank)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's chunks of ``x``, which is whole along ``dim``.

        Raises:
            ValueError: ``dim`` does not divide into 2 cp chunks.
        """
        if self.axis.size == 1:
            return x
        if x.shape[dim] % (2 * self.axis.size):
            raise ValueError(f"dim {dim} of {tuple(x.shape)} is not divisible by 2 x cp = {2 * self.axis.size}")
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


class _Passing:
    """A tensor on its way from the previous rank of a ring, while this rank's is on its way to the next."""

    def __init__(self, x: Tensor, axis: Axis) -> None:
        self._sent, self._coming = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        ahead, behind = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, group=axis.group, group_peer=ahead),
                dist.P2POp(dist.irecv, self._coming, group=axis.group, group_peer=behind),
            ]
        )

    def wait(self) -> Tensor:
        """What the previous rank sent."""
        for work in self._works:
            work.wait()
        return self._coming


def pass_on(x: Tensor, axis: Axis) -> _Passing:
    """Sends ``x`` to the next rank and receives that of the previous one. Not differentiable."""
    return _Passing(x, axis)


def ring(x: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """(rank, its ``x``) of every rank of the axis, this one first; the next is on its way meanwhile. The caller must
    exhaust it. Not differentiable."""
    for step in range(axis.size):
        coming = pass_on(x, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, x
        if coming is not None:
            x = coming.wait()
