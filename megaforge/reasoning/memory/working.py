"""Working memory: summaries of all that was read, as vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megaforge.errors import UserError


class WorkingMemory:
    """Vectors [n, S] in the order of the text, each of ``weights`` [n] strides. It grows with use; where there are
    more than ``most``, neighbours are merged to their mean, all of them at once, so that what is older is coarser.

    Nothing is written in place: a fork shares the tensors.
    """

    def __init__(self, dim: int, most: int, dtype: torch.dtype = torch.float32) -> None:
        self.dim, self.most = dim, most
        self.vectors = torch.zeros(0, dim, dtype=dtype)
        self.weights = torch.zeros(0, dtype=dtype)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + self.weights.nbytes

    def add(self, vectors: Tensor) -> None:
        """Takes in summaries [n, S].

        Raises:
            ValueError: they are of another size.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"summaries of shape {tuple(vectors.shape)}; working memory has (n, {self.dim})")
        vectors = vectors.detach().to("cpu", self.vectors.dtype)
        self.vectors = torch.cat([self.vectors, vectors])
        self.weights = torch.cat([self.weights, self.weights.new_ones(len(vectors))])
        while len(self) > self.most:
            self._halve()

    def _halve(self) -> None:
        even = len(self) // 2 * 2
        weights = self.weights[:even].view(-1, 2)
        vectors = (self.vectors[:even].view(-1, 2, self.dim) * weights[..., None]).sum(1) / weights.sum(1)[:, None]
        self.vectors = torch.cat([vectors, self.vectors[even:]])
        self.weights = torch.cat([weights.sum(1), self.weights[even:]])

    def read(self, query: Tensor | None = None) -> Tensor:
        """[S]: the mean of all that was taken in; with a ``query`` [S] their mean by softmax(q v / sqrt(S)). Zero where
        nothing was."""
        if not len(self):
            return self.vectors.new_zeros(self.dim)
        if query is None:
            return self.weights @ self.vectors / self.weights.sum()
        near = self.vectors @ query.detach().to("cpu", self.vectors.dtype) / math.sqrt(self.dim)
        return (near + self.weights.log()).softmax(0) @ self.vectors

    def fork(self) -> WorkingMemory:
        """Another of the same content."""
        new = object.__new__(WorkingMemory)
        new.__dict__.update(self.__dict__)
        return new

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        return {"vectors": self.vectors, "weights": self.weights}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` gave.

        Raises:
            UserError: its vectors are of another size.
        """
        vectors = state["vectors"]
        if vectors.shape[1] != self.dim:
            raise UserError(
                f"--memory-dim {self.dim}: the saved memory has summaries of size {vectors.shape[1]}; use that"
            )
        self.vectors, self.weights = (state[name].to(self.vectors.dtype) for name in ("vectors", "weights"))
        while len(self) > self.most:
            self._halve()
