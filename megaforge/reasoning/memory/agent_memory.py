"""The memory of an agent that reads one text: summaries, the episodic index, and what it has looked up last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.config.config import Config
from megaforge.reasoning.memory.episodic import EpisodicIndex
from megaforge.reasoning.memory.token_lists import joined, split
from megaforge.reasoning.memory.working import WorkingMemory


@dataclass(frozen=True)
class MemoryShape:
    """
    Attributes:
        dim: S, of summaries and keys.
        slots: entries of the index, at most.
        working: vectors of working memory, at most.
        search: of the index (:data:`megaforge.registry.MEMORY_SEARCHES`).
    """

    dim: int
    slots: int
    working: int = 1024
    search: str = "torch"

    @classmethod
    def of(cls, config: Config) -> MemoryShape:
        """What the flags ask for."""
        flags = config.rl
        return cls(config.model.memory_dim, flags.memory_slots, flags.memory_working, flags.memory_index)


@dataclass
class _Content:
    """What a memory holds.

    Attributes:
        staged: tokens of the entries that were looked up last and are not in the window yet, the nearest first.
    """

    working: WorkingMemory
    index: EpisodicIndex
    staged: tuple[tuple[int, ...], ...] = ()

    def fork(self) -> _Content:
        return _Content(self.working.fork(), self.index.fork(), self.staged)


class AgentMemory:
    """Every rank makes the same calls, with the same values.

    A branch (:meth:`fork`) begins with the content of its parent. Neither sees what the other does; memory is copied
    where it is written. :meth:`commit` gives a branch's content to its parent, :meth:`rollback` forgets what the branch
    has done.
    """

    def __init__(
        self, shape: MemoryShape, dtype: torch.dtype = torch.float32, beneath: EpisodicIndex | None = None
    ) -> None:
        """
        Args:
            dtype: of summaries.
            beneath: an index that is searched too, and only read.

        Raises:
            UserError: there is no such search, or its package is not installed.
        """
        self.shape, self.dtype = shape, dtype
        index = EpisodicIndex(shape.dim, shape.slots, shape.search, beneath)
        self._content = _Content(WorkingMemory(shape.dim, shape.working, dtype), index)
        self._changes = 0  # a number for each content that there was
        self._parent: AgentMemory | None = None
        self._parent_changes = self._begun = 0
        self._beginning: _Content | None = None

    @property
    def staged(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the entries that were looked up and are not in the window yet, the nearest first."""
        return self._content.staged

    @property
    def index(self) -> EpisodicIndex:
        """The episodic index, to look at."""
        return self._content.index

    @property
    def entries(self) -> int:
        """Of the index."""
        return len(self._content.index)

    @property
    def summaries(self) -> int:
        """Vectors of working memory."""
        return len(self._content.working)

    @property
    def evicted(self) -> int:
        """Entries that the index has given up for want of room."""
        return self._content.index.evicted

    @property
    def nbytes(self) -> int:
        """It grows with use; what branches share counts in each."""
        return self._content.working.nbytes + self._content.index.nbytes

    def summarize(self, vectors: Tensor) -> None:
        """Adds the summaries [n, S] of a chunk to working memory."""
        self._changes += 1
        self._content.working.add(vectors)

    def write(self, key: Tensor, tokens: Sequence[int]) -> None:
        """Adds a chunk's tokens to the index, to be found by ``key`` [S]; see :meth:`EpisodicIndex.write`."""
        self._changes += 1
        self._content.index.write(key, tokens)

    def retrieve(self, query: Tensor, k: int) -> list[tuple[int, ...]]:
        """Looks up the ``k`` entries nearest to ``query`` [S], which replace what was staged."""
        self._changes += 1
        found = self._content.index.retrieve(query, k)
        self._content.staged = tuple(found)
        return found

    def splice(self, room: int) -> tuple[int, ...]:
        """Takes staged entries for the window: whole ones, the nearest first, until one does not fit into what is left
        of ``room`` tokens. Returns their tokens behind each other."""
        taken, left = 0, room
        for entry in self.staged:
            if len(entry) > left:
                break
            taken, left = taken + 1, left - len(entry)
        self._changes += bool(taken)
        spliced, self._content.staged = self.staged[:taken], self.staged[taken:]
        return tuple(token for entry in spliced for token in entry)

    def vector(self, query: Tensor | None = None) -> Tensor:
        """[S], what working memory holds; see :meth:`WorkingMemory.read`."""
        return self._content.working.read(query)

    def fork(self) -> AgentMemory:
        """A branch."""
        new = object.__new__(AgentMemory)
        new.shape, new.dtype = self.shape, self.dtype
        new._content, new._beginning = self._content.fork(), self._content.fork()
        new._parent, new._parent_changes = self, self._changes
        new._changes = new._begun = 0
        return new

    @property
    def changed(self) -> bool:
        """Whether the branch has done anything since it began, or was last committed."""
        return self._changes != self._begun

    @property
    def stale(self) -> bool:
        """Whether the parent has changed since the branch began, or was last committed."""
        return self._parent is not None and self._parent._changes != self._parent_changes

    def commit(self) -> None:
        """Gives the branch's content to its parent. A second time changes nothing.

        Raises:
            ValueError: this is no branch, or the parent has changed since, so that its changes would be lost.
        """
        parent = self._parent
        if parent is None:
            raise ValueError("commit: this memory is no branch")
        if not self.changed:
            return
        if self.stale:
            raise ValueError("commit: the parent has changed since this branch began; fork it again")
        parent._content = self._content.fork()
        parent._changes += 1
        self._begin(parent._changes)

    def _begin(self, parent_changes: int) -> None:
        """What the branch does from now on is new."""
        self._parent_changes, self._begun, self._beginning = parent_changes, self._changes, self._content.fork()

    def rollback(self) -> None:
        """Back to what the branch was when it began, or was last committed.

        Raises:
            ValueError: this is no branch.
        """
        if self._beginning is None:
            raise ValueError("rollback: this memory is no branch")
        self._content = self._beginning.fork()
        self._begun = self._changes

    def digest(self) -> str:
        """SHA-256 of the content."""
        found = hashlib.sha256()
        for name, tensor in self.state().items():
            found.update(as_bytes(name, tensor))
        return found.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        content = self._content
        tokens, lengths = joined(content.staged)
        working = {f"working.{name}": tensor for name, tensor in content.working.state().items()}
        index = {f"index.{name}": tensor for name, tensor in content.index.state().items()}
        return {**working, **index, "staged.tokens": tokens, "staged.lengths": lengths}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` gave.

        Raises:
            UserError: it is of another size, or has more entries than there are slots.
        """
        self._changes += 1
        self._content.working.load_state(_of(state, "working."))
        self._content.index.load_state(_of(state, "index."))
        self._content.staged = tuple(split(state["staged.tokens"], state["staged.lengths"]))


def _of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def as_bytes(name: str, tensor: Tensor) -> bytes:
    """What a digest takes in of a tensor: its name, type and shape, and its values."""
    values = torch.empty(tensor.numel(), dtype=tensor.dtype)  # of stride 1, however few there are
    values.copy_(tensor.detach().reshape(-1))
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + values.view(torch.uint8).numpy().tobytes()
