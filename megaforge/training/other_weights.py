"""Weights that a run keeps beside those that it trains, and computes with for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from megaforge.optim.main_parameters import MainParameters
from megaforge.parallel.flat_shard import Entry, optimizer_shard

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class OtherWeights:
    """
    Attributes:
        tensors: of each trained parameter, like its master: fp32 (fp64 for fp64 models); under ZeRO this rank's part.
    """

    def __init__(self, main: MainParameters) -> None:
        """Zeros, until something is put there."""
        self.main = main
        self.tensors = [torch.zeros_like(one.master).requires_grad_(False) for one in main.trained]

    @classmethod
    def of(cls, trainer: Trainer) -> OtherWeights:
        """Beside those that ``trainer`` trains."""
        return cls(trainer.optimizer.main)

    @torch.no_grad()
    def take(self) -> None:
        """What is trained, as it is now."""
        for own, one in zip(self.tensors, self.main.trained, strict=True):
            own.copy_(one.master)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with these; afterwards with its own weights again, bit for bit. Collective under ZeRO."""
        self._exchange()
        self.main.after_load()
        try:
            yield
        finally:
            self._exchange()
            self.main.write_back()
        # Not after an exception: the other ranks may never come to gather.
        if self.main.shards is not None:
            self.main.shards.all_gather_parameters()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Masters become these, and these masters, one by one."""
        if self.main.shards is not None:
            self.main.shards.wait_for_parameters()
        for one, other in zip(self.main.trained, self.tensors, strict=True):
            kept = one.master.clone()
            one.master.copy_(other)
            other.copy_(kept)

    def entries(self) -> list[Entry]:
        """As checkpoints keep them."""
        return [
            (one.spec.name, optimizer_shard(one.parameter), other)
            for one, other in zip(self.main.trained, self.tensors, strict=True)
        ]
