"""What an implementation of Mamba-2's recurrence makes of some tokens before the state in front of them is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Piece(Protocol):
    """Some tokens of every sequence."""

    def summary(self) -> tuple[Tensor, Tensor]:
        """What they leave of the state before them, [b, H], and what they add to it, [b, H, P, N]."""
        ...

    def output(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The results of :func:`megaforge.kernels.ssd.ssd`."""
        ...


SSD = Callable[..., Piece]  # (x, step, a, b, c, skip, document_start), as :func:`megaforge.kernels.ssd.ssd` has them
