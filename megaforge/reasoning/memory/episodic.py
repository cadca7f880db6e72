"""The episodic index: chunks of a text, each found again by its key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.reasoning.memory.searches import Search
from megaforge.reasoning.memory.token_lists import joined, split
from megaforge.registry import MEMORY_SEARCHES

PAGE = 1024  # keys of a page, at most: what a branch copies when it writes to one that others see too
_UNIT = 2.0**-24  # how far a number is rounded in fp32, at most, as a share of it


@dataclass
class Page:
    """Keys fp32 [rows, S], of which the first ``used`` are some; ``prepared`` is what the search keeps of them."""

    keys: Tensor
    used: int = 0
    prepared: Any = None

    def copy(self) -> Page:
        return Page(self.keys.clone(), self.used)

    def set(self, row: int, key: Tensor) -> None:
        if row == len(self.keys):  # grows with use
            more = min(2 * row, PAGE) - row
            self.keys = torch.cat([self.keys, self.keys.new_zeros(more, self.keys.shape[1])])
        self.keys[row] = key
        self.used, self.prepared = max(self.used, row + 1), None


class EpisodicIndex:
    """Up to ``capacity`` entries, each a key and a chunk's tokens. A full index gives up the entry that was found
    least often, of these the oldest.

    :meth:`fork` shares pages; each index copies the ones that it writes to.

    Attributes:
        evicted: how many entries were given up.
    """

    def __init__(self, dim: int, capacity: int, search: str = "torch") -> None:
        """
        Args:
            dim: S, of keys.
            search: a name in :data:`megaforge.registry.MEMORY_SEARCHES`; all find the same.

        Raises:
            UserError: there is no such search, or its package is not installed.
        """
        self.dim, self.capacity = dim, capacity
        self.evicted = self._clock = 0
        self._search: Search = MEMORY_SEARCHES.get(search)()
        self._pages: list[Page] = []
        self._own: set[int] = set()  # pages that nobody else sees
        self._tokens: list[tuple[int, ...]] = []
        self._uses, self._written = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._longest = 0.0  # norm of any key so far

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Memory of keys and tokens, those of shared pages included."""
        keys = sum(page.keys.nbytes for page in self._pages)
        return keys + self._uses.nbytes + self._written.nbytes + 8 * sum(map(len, self._tokens))

    def write(self, key: Tensor, tokens: Sequence[int]) -> None:
        """Adds an entry.

        Args:
            key: [S], kept in fp32.
            tokens: of the chunk.

        Raises:
            ValueError: the key is of another size, or not finite.
        """
        key = self._checked(key, "key")
        if len(self) < self.capacity:
            slot = len(self)
            self._tokens.append(tuple(tokens))
            self._uses, self._written = np.append(self._uses, 0), np.append(self._written, self._clock)
        else:
            slot = self._given_up()
            self.evicted += 1
            self._tokens[slot] = tuple(tokens)
            self._uses[slot], self._written[slot] = 0, self._clock
        self._clock += 1
        self._longest = max(self._longest, float(key.double().norm()))
        self._writable(slot // PAGE).set(slot % PAGE, key)

    def _given_up(self) -> int:
        least = np.flatnonzero(self._uses == self._uses.min())
        return int(least[self._written[least].argmin()])

    def _writable(self, number: int) -> Page:
        if number == len(self._pages):
            self._pages.append(Page(torch.zeros(min(16, self.capacity), self.dim)))
            self._own.add(number)
        elif number not in self._own:
            self._pages[number] = self._pages[number].copy()
            self._own.add(number)
        return self._pages[number]

    def retrieve(self, query: Tensor, k: int) -> list[tuple[int, ...]]:
        """The tokens of up to ``k`` entries, by the inner product of their keys with ``query`` [S]: the highest first,
        of equals the oldest. Each counts as found once more.

        Raises:
            ValueError: the query is of another size, or not finite.
        """
        query = self._checked(query, "query")
        slots = self.nearest(query, k)
        self._uses[slots] += 1
        return [self._tokens[slot] for slot in slots]

    def nearest(self, query: Tensor, k: int) -> list[int]:
        """The places of these entries, for a query of fp32."""
        if not len(self) or k < 1:
            return []
        # An inner product in fp32 is off by no more than half of this, in whatever order it is summed.
        slack = 2.02 * self.dim * (_UNIT * float(query.double().norm()) * self._longest + 1e-37)
        found, products = [], []
        for number, page in enumerate(self._pages):
            keys = page.keys[: page.used]
            near = torch.arange(page.used)
            if math.isfinite(slack) and slack < 1e30:
                page.prepared = self._search.prepare(keys) if page.prepared is None else page.prepared
                near = self._search.candidates(page.prepared, query, k, slack)
            # Summed row by row: equal keys have equal products, wherever they lie.
            products.append((keys[near].double() * query.double()).sum(-1).numpy())
            found.append(near.numpy() + number * PAGE)
        slots, scores = np.concatenate(found), np.concatenate(products)
        order = np.lexsort((self._written[slots], -scores))[:k]
        return [int(slot) for slot in slots[order]]

    def _checked(self, vector: Tensor, name: str) -> Tensor:
        if vector.shape != (self.dim,):
            raise ValueError(f"a {name} of shape {tuple(vector.shape)}; entries' have ({self.dim},)")
        vector = vector.detach().to("cpu", torch.float32)
        if not bool(vector.isfinite().all()):
            raise ValueError(f"a {name} that is not finite; the model's hidden states are not, or beyond fp32")
        return vector

    def fork(self) -> EpisodicIndex:
        """Another of the same content; what either does later the other does not see."""
        new = object.__new__(EpisodicIndex)
        new.__dict__.update(self.__dict__)
        new._pages, new._tokens = list(self._pages), list(self._tokens)
        new._uses, new._written = self._uses.copy(), self._written.copy()
        self._own, new._own = set(), set()
        return new

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        keys = [page.keys[: page.used] for page in self._pages]
        flat, lengths = joined(self._tokens)
        return {
            "keys": torch.cat(keys) if keys else torch.zeros(0, self.dim),
            "uses": torch.from_numpy(self._uses.copy()),
            "written": torch.from_numpy(self._written.copy()),
            "tokens": flat,
            "lengths": lengths,
            "counts": torch.tensor([self.evicted, self._clock]),
            "longest": torch.tensor([self._longest], dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` gave.

        Raises:
            UserError: its keys are of another size, or more than there is room for.
        """
        keys = state["keys"]
        if keys.shape[1] != self.dim or len(keys) > self.capacity:
            raise UserError(
                f"--memory-dim {self.dim}, --memory-slots {self.capacity}: the saved memory has {len(keys)} entries of "
                f"size {keys.shape[1]}; use its size and at least as many slots"
            )
        self._pages = [Page(some.clone(), len(some)) for some in keys.split(PAGE) if len(some)]
        self._own = set(range(len(self._pages)))
        self._tokens = split(state["tokens"], state["lengths"])
        self._uses, self._written = state["uses"].numpy().copy(), state["written"].numpy().copy()
        self.evicted, self._clock = state["counts"].tolist()
        self._longest = float(state["longest"])
