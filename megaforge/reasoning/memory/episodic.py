"""The episodic index: chunks of a text, each found again by its key."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.reasoning.memory.searches import Search
from megaforge.reasoning.memory.token_lists import joined, split
from megaforge.registry import MEMORY_SEARCHES

PAGE = 1024  # keys of a page, at most: what a branch copies when it writes to one that others see too
_NUMBERS = 16  # bytes of what is known of an entry: how often it was found, and when it was written
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


class Entry(NamedTuple):
    """A chunk in an index.

    Attributes:
        key: fp32 [S].
        uses: how often it was found.
    """

    key: Tensor
    tokens: tuple[int, ...]
    uses: int


def most_bytes(dim: int, capacity: int, tokens: int) -> int:
    """:attr:`EpisodicIndex.nbytes` of a full index of chunks of so many tokens."""
    return capacity * (4 * dim + _NUMBERS + 8 * tokens)


class _Found(NamedTuple):
    """What a search found, so that the least is the best: of equal products the one from further beneath, then the
    older one."""

    score: float  # the product, negated
    place: int  # of its index, from the undermost
    order: int
    slot: int
    tokens: tuple[int, ...]


class EpisodicIndex:
    """Up to ``capacity`` entries, each a key and a chunk's tokens. A full index gives up the entry that was found
    least often, of these the oldest.

    :meth:`fork` shares pages; each index copies the ones that it writes to.

    Attributes:
        evicted: how many entries were given up.
        beneath: another index, whose entries are found as well and which is only read; its forks share it.
        used_beneath: how often each of its entries was found from here, by their slots.
    """

    def __init__(self, dim: int, capacity: int, search: str = "torch", beneath: EpisodicIndex | None = None) -> None:
        """
        Args:
            dim: S, of keys.
            search: a name in :data:`megaforge.registry.MEMORY_SEARCHES`; all find the same.

        Raises:
            UserError: there is no such search, or its package is not installed.
        """
        self.dim, self.capacity, self.beneath = dim, capacity, beneath
        self.used_beneath = Counter[int]()
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
        """Of keys and tokens, those of shared pages included, not those beneath."""
        keys = sum(page.used for page in self._pages) * self.dim * 4
        return keys + self._uses.nbytes + self._written.nbytes + 8 * sum(map(len, self._tokens))

    def write(self, key: Tensor, tokens: Sequence[int]) -> Entry | None:
        """Adds an entry.

        Args:
            key: [S], kept in fp32.
            tokens: of the chunk.

        Returns:
            What was given up for it.

        Raises:
            ValueError: the key is of another size, or not finite.
        """
        key, lost = self._checked(key, "key"), None
        if len(self) < self.capacity:
            slot = len(self)
            self._tokens.append(tuple(tokens))
            self._uses, self._written = np.append(self._uses, 0), np.append(self._written, self._clock)
        else:
            slot = self._given_up()
            self.evicted, lost = self.evicted + 1, self._entry(slot)
            self._tokens[slot] = tuple(tokens)
            self._uses[slot], self._written[slot] = 0, self._clock
        self._clock += 1
        self._longest = max(self._longest, float(key.double().norm()))
        self._writable(slot // PAGE).set(slot % PAGE, key)
        return lost

    def entries(self) -> list[Entry]:
        """Those of this index, the oldest first."""
        return [self._entry(int(slot)) for slot in self._written.argsort()]

    def _entry(self, slot: int) -> Entry:
        key = self._pages[slot // PAGE].keys[slot % PAGE].clone()
        return Entry(key, self._tokens[slot], int(self._uses[slot]))

    def count_uses(self, uses: Mapping[int, int]) -> None:
        """The entries in these slots were found so many times more."""
        for slot, count in uses.items():
            self._uses[slot] += count

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
        of equals the oldest; what is :attr:`beneath` is older than all here. Each counts as found once more.

        Raises:
            ValueError: the query is of another size, or not finite.
        """
        found = self._found(self._checked(query, "query"), k)
        for one in found:
            if one.place == self._place:
                self._uses[one.slot] += 1
            elif one.place == self._place - 1:
                self.used_beneath[one.slot] += 1
        return [one.tokens for one in found]

    @property
    def _place(self) -> int:
        return 0 if self.beneath is None else self.beneath._place + 1

    def _found(self, query: Tensor, k: int) -> list[_Found]:
        """Up to ``k`` entries of this index and of those beneath, the best first, for a query of fp32."""
        slots, scores = self._nearest(query, k)
        own = [
            _Found(-float(score), self._place, int(self._written[slot]), slot, self._tokens[slot])
            for slot, score in zip(slots, scores, strict=True)
        ]
        return own if self.beneath is None else sorted([*self.beneath._found(query, k), *own])[:k]

    def nearest(self, query: Tensor, k: int) -> list[int]:
        """The slots of the entries of this index alone, for a query of fp32."""
        return self._nearest(query, k)[0]

    def _nearest(self, query: Tensor, k: int) -> tuple[list[int], list[float]]:
        """These, and the products of their keys with the query."""
        if not len(self) or k < 1:
            return [], []
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
        return slots[order].tolist(), scores[order].tolist()

    def _checked(self, vector: Tensor, name: str) -> Tensor:
        if vector.shape != (self.dim,):
            raise ValueError(f"a {name} of shape {tuple(vector.shape)}; entries' have ({self.dim},)")
        vector = vector.detach().to("cpu", torch.float32)
        if not bool(vector.isfinite().all()):
            raise ValueError(f"a {name} that is not finite; the model's hidden states are not, or beyond fp32")
        return vector

    @property
    def keys(self) -> list[Tensor]:
        """Of all entries, by slots: pages fp32 [rows, S], in place."""
        return [page.keys[: page.used] for page in self._pages]

    def fork(self) -> EpisodicIndex:
        """Another of the same content; what either does later the other does not see."""
        new = object.__new__(EpisodicIndex)
        new.__dict__.update(self.__dict__)
        new._pages, new._tokens = list(self._pages), list(self._tokens)
        new._uses, new._written = self._uses.copy(), self._written.copy()
        new.used_beneath = self.used_beneath.copy()
        self._own, new._own = set(), set()
        return new

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        keys = self.keys
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
