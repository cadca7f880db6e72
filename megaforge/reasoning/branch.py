"""Branches: ways in which a reading may go on, side by side, until one is accepted.

A branch has what the model remembers of what it has read (recurrent states, caches, fast weights) and the agent's
memory. What branches have in common is shared, and copied by the one that changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.inference.staged import StagedModel
from megaforge.models.generation_state import GenerationState
from megaforge.reasoning.memory.agent_memory import AgentMemory, as_bytes


class Branch:
    """Of one text. Ranks that share the model make the same calls.

    Attributes:
        memory: the agent's.
    """

    def __init__(self, model: StagedModel, memory: AgentMemory) -> None:
        """One that has read nothing."""
        self.model, self.memory = model, memory
        self._state, self._shared = model.new_state(), False
        self._beginning: GenerationState | None = None
        self._parent: Branch | None = None

    @property
    def length(self) -> int:
        """Tokens that the model has read."""
        return self._state.length

    @property
    def nbytes(self) -> int:
        """Of what this rank's layers remember, and of the memory; what branches share counts in each."""
        return sum(tensor.nbytes for tensor in self._state.contents()) + self.memory.nbytes

    def read(self, tokens: Sequence[int]) -> Tensor | None:
        """The model goes on by ``tokens``, at least one: its scores after the last of them [1, vocabulary]; None on
        ranks without the last stage."""
        if self._shared:
            self._state, self._shared = self._state.copy(), False
        given = torch.tensor([list(tokens)], dtype=torch.long, device=self.model.ctx.device)
        return self.model.logits(given, self._state)

    def fork(self) -> Branch:
        """A branch that begins as this one is."""
        new = object.__new__(Branch)
        new.model, new.memory, new._parent = self.model, self.memory.fork(), self
        new._state = new._beginning = self._state
        self._shared = new._shared = True
        return new

    def commit(self) -> None:
        """Makes this branch's content its parent's. A second time changes nothing.

        Raises:
            ValueError: this is no branch, or the parent has changed since, so that its changes would be lost.
        """
        if self._parent is None:
            raise ValueError("commit: this is no branch")
        if self._state is self._beginning and not self.memory.changed:
            return
        if self._parent._state is not self._beginning or self.memory.stale:
            raise ValueError("commit: the parent has changed since this branch began; fork it again")
        self.memory.commit()
        self._parent._state = self._beginning = self._state
        self._parent._shared = self._shared = True

    def rollback(self) -> None:
        """Back to what this branch was when it began, or was last committed.

        Raises:
            ValueError: this is no branch.
        """
        if self._beginning is None:
            raise ValueError("rollback: this is no branch")
        self.memory.rollback()
        self._state, self._shared = self._beginning, True

    def digest(self) -> str:
        """SHA-256 of all that this rank's layers remember, and of the memory."""
        found = hashlib.sha256(f"{self._state.length} {self.memory.digest()}\n".encode())
        for tensor in self._state.contents():
            found.update(as_bytes("state", tensor))
        return found.hexdigest()
