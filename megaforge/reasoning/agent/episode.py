"""One reading of a long text: what the agent has in sight, what it does, and where that leads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from megaforge.config.rl_config import ReinforcementConfig
from megaforge.reasoning.agent.actions import AgentAction
from megaforge.reasoning.memory.agent_memory import AgentMemory
from megaforge.reasoning.packing import Packed, Tokens, pack
from megaforge.registry import AGENT_ACTIONS

FLAGS = ("answering", "written", "staged", "spliced")


class Context(NamedTuple):
    """What the model sees when the agent decides, as a document of its own.

    Attributes:
        tokens: window, chunk, question; and, where the agent may answer, the right answer behind them, which nothing
            before it sees.
        chunk: where the chunk begins and ends.
        last: the place of the last token that is seen.
    """

    tokens: Tokens
    chunk: tuple[int, int]
    last: int


def pack_contexts(contexts: Iterable[Context], length: int) -> Packed[Context]:
    """Contexts behind each other in rows of ``length`` tokens.

    Raises:
        UserError: one is longer than a row.
    """
    what = "the agent sees {} tokens at once (window, chunk, question, answer)"
    return pack(contexts, length, what, "--agent-window or --task-chunk-tokens")


class Seen(NamedTuple):
    """What the model makes of a context.

    Attributes:
        hidden: [d], the normed residual stream at its last token.
        key: [S], of that.
        summaries: [n, S], of the chunk.
        right: whether each token of the answer scores highest behind those before it.
    """

    hidden: Tensor
    key: Tensor
    summaries: Tensor
    right: bool


class Decision(NamedTuple):
    """
    Attributes:
        flags: :data:`FLAGS` then.
        memory: [S], what was read of working memory.
        action: its number.
    """

    context: Context
    flags: tuple[float, ...]
    memory: Tensor
    action: int


@dataclass(frozen=True)
class Setting:
    """What is the same for all episodes.

    Attributes:
        window: tokens.
        answer_steps: decisions behind the last chunk, at most.
        top_k: chunks that are retrieved.
        actions: by their numbers.
    """

    window: int
    answer_steps: int
    top_k: int
    actions: tuple[AgentAction, ...] = field(
        default_factory=lambda: tuple(AGENT_ACTIONS.get(name) for name in AGENT_ACTIONS.names())
    )

    @classmethod
    def of(cls, flags: ReinforcementConfig) -> Setting:
        """What the flags ask for."""
        return cls(flags.agent_window, flags.agent_answer_steps, flags.memory_top_k)


class Episode:
    """A text that is being read. While there are chunks each decision also goes on to the next; behind them the answer
    is due once something is in the window, or when the decisions are used up.

    Attributes:
        sample: its number in the run.
        chunks, question, answer: tokens.
        memory: what the agent keeps.
        window: tokens that it has taken into sight.
        place: chunks read.
        decisions: so far.
        verdict: whether the answer was right; None: not known yet.
        worth: what the answer is worth, once it is known.
    """

    def __init__(
        self, sample: int, texts: tuple[Sequence[Tokens], Tokens, Tokens], memory: AgentMemory, setting: Setting
    ) -> None:
        """``texts``: chunks, question and answer."""
        self.sample, self.memory, self.setting = sample, memory, setting
        self.chunks, self.question, self.answer = texts
        self.window: Tokens = ()
        self.place = 0
        self.decisions: list[Decision] = []
        self.verdict: bool | None = None
        self.worth = 0.0
        self._now: Context | None = None  # what :meth:`context` gave, until something is decided

    def fork(self) -> Episode:
        """Another that goes on from here."""
        new = copy.copy(self)
        new.memory, new.decisions = self.memory.fork(), list(self.decisions)
        return new

    @property
    def answering(self) -> bool:
        """Whether there is nothing more to read."""
        return self.place == len(self.chunks)

    @property
    def decided(self) -> bool:
        """Whether only the answer is left."""
        steps = len(self.decisions) - len(self.chunks)
        return self.answering and (bool(self.window) or steps >= self.setting.answer_steps)

    @property
    def flags(self) -> tuple[float, ...]:
        """:data:`FLAGS` now."""
        memory = self.memory
        return tuple(map(float, (self.answering, memory.entries > 0, bool(memory.staged), bool(self.window))))

    @property
    def cost(self) -> int:
        """Actions that were not free."""
        return sum(not self.setting.actions[decision.action].free for decision in self.decisions)

    def context(self) -> Context:
        """What the model is to see now."""
        if self._now is None:
            self._now = self._ahead(0)
        return self._now

    def _ahead(self, ahead: int) -> Context:
        """What it would see so many chunks later, if the window stayed."""
        place, begin = self.place + ahead, len(self.window)
        chunk = self.chunks[place] if place < len(self.chunks) else ()
        seen = (*self.window, *chunk, *self.question)
        tokens = seen if place < len(self.chunks) else (*seen, *self.answer)
        return Context(tokens, (begin, begin + len(chunk)), len(seen) - 1)

    def contexts(self) -> list[Context]:
        """All that the model would see from now on, if the window stayed."""
        return [self._ahead(ahead) for ahead in range(len(self.chunks) - self.place + 1)]

    def decide(self, seen: Seen, memory: Tensor, action: int) -> None:
        """Does ``action``, chosen from what was ``seen`` of the present context and read of ``memory``."""
        self.decisions.append(Decision(self.context(), self.flags, memory, action))
        self.setting.actions[action].act(self, seen)
        self._now = None
        self.place += not self.answering
