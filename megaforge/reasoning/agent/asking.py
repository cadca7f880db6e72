"""A trained agent at work: it reads a text in several ways at once, each a branch, and what the best of them has done
is kept.

A branch plays an episode as training does, its actions drawn from the policy (of a single branch: the most probable
ones), and then writes its answer, the most likely token each time. A branch's reward is that of training
(``--rl-reward``); where nobody knows the answer, the share of branches that write the same stands for a right one. Its
advantage is its reward less the mean of all. The first of the best is accepted where its advantage is at least a
threshold: it is committed. All others are rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megaforge.config.config import Config
from megaforge.inference.staged import StagedModel
from megaforge.parallel.agree import tell_stages
from megaforge.reasoning.advantages import over_mean
from megaforge.reasoning.agent.algorithms import shares_alike, worth_of_end
from megaforge.reasoning.agent.episode import Episode, Setting
from megaforge.reasoning.agent.player import greedy, play, sampled
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.branch import Branch
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.episodic import EpisodicIndex
from megaforge.reasoning.packing import Tokens
from megaforge.registry import AGENT_ACTIONS

_ROWS = 64  # of contexts that the model sees at once, at most
_AHEAD = 16  # texts that are read side by side


@dataclass(frozen=True)
class Text:
    """
    Attributes:
        number: its draws are of that and the seed, whatever else is read.
        chunks, question: tokens.
        answer: tokens; none: nobody knows it.
    """

    number: int
    chunks: tuple[Tokens, ...]
    question: Tokens
    answer: Tokens = ()


@dataclass(frozen=True)
class Way:
    """What one branch has done.

    Attributes:
        actions: names.
        written: its answer.
        right: whether that begins with the right one; None: nobody knows.
        reward, advantage: see the module.
        cost: actions that were not free.
        entries, summaries, nbytes: of its memory, at the end.
    """

    actions: tuple[str, ...]
    written: Tokens
    right: bool | None
    reward: float
    advantage: float
    cost: int
    entries: int
    summaries: int
    nbytes: int


@dataclass(frozen=True)
class Reading:
    """
    Attributes:
        ways: of all branches.
        first: the number of the first of the best.
        accepted: that number, where it was accepted; None: its advantage was not enough.
        acceptable: how many advantages were.
    """

    ways: tuple[Way, ...]
    first: int
    accepted: int | None
    acceptable: int

    @property
    def best(self) -> Way:
        """The first of the best."""
        return self.ways[self.first]


@dataclass(frozen=True)
class Asking:
    """How texts are read.

    Attributes:
        branches: ways in which each is read.
        seed: of the draws.
        threshold: least advantage of a branch that is accepted.
        most_tokens: of an answer.
        end: the token that ends an answer, if any.
        search: of the index (:data:`megaforge.registry.MEMORY_SEARCHES`); None: as in training.
        worth: of what was written to a question whose answer is known, all tokens; None: 1 for what begins with it.
        beneath: an index that every memory also finds chunks in: what a run remembers.
    """

    branches: int = 1
    seed: int = 0
    threshold: float = 0.0
    most_tokens: int = 32
    end: int | None = None
    search: str | None = None
    worth: Callable[[Tokens, Tokens, Tokens], float] | None = None
    beneath: EpisodicIndex | None = None


class Asker:
    """Reads texts with a trained agent, at the layout of its model. Ranks that share the model make the same calls.

    Attributes:
        root: what texts begin with, and what accepted branches are committed to; see :meth:`ask`.
        reader: what the model sees by.
        setting: of episodes.
    """

    def __init__(self, model: StagedModel, config: Config, how: Asking) -> None:
        """
        Raises:
            UserError: the model has no heads that decide.
        """
        self.model, self.how, self._flags = model, how, config.rl
        self.reader = Reader(model, config.model, config.data.seq_length, _ROWS)
        self.reader.share_heads()
        self.setting, self._shape = Setting.of(config.rl), MemoryShape.of(config)
        if how.search is not None:
            self._shape = replace(self._shape, search=how.search)
        self.root = self.new_root()

    def new_root(self) -> Branch:
        """One that has read nothing."""
        return Branch(self.model, AgentMemory(self._shape, self.reader.heads.policy.weight.dtype, self.how.beneath))

    def digest(self) -> str:
        """SHA-256 of what makes summaries and keys."""
        return self.reader.digest()

    def ask(self, text: Text) -> Reading:
        """Reads one text, beginning with what earlier ones have left in :attr:`root`. Collective.

        Raises:
            UserError: a window, a chunk and the question together are longer than the model's sequences.
        """
        return self._read([text], [self.root])[0]

    def ask_each(self, texts: Sequence[Text]) -> list[Reading]:
        """Reads texts each by itself, beginning with nothing, several side by side. Collective."""
        found = []
        for start in range(0, len(texts), _AHEAD):
            some = texts[start : start + _AHEAD]
            found += self._read(some, [self.new_root() for _ in some])
        return found

    def _read(self, texts: Sequence[Text], roots: Sequence[Branch]) -> list[Reading]:
        how = self.how
        forks = [[root.fork() for _ in range(how.branches)] for root in roots]
        episodes = [
            [
                Episode(
                    text.number * how.branches + n, (text.chunks, text.question, text.answer), one.memory, self.setting
                )
                for n, one in enumerate(own)
            ]
            for text, own in zip(texts, forks, strict=True)
        ]
        policy = greedy if how.branches == 1 else sampled
        play([one for own in episodes for one in own], self.reader, policy, how.seed, 0)
        return [self._judged(*own) for own in zip(texts, episodes, forks, strict=True)]

    def _judged(self, text: Text, episodes: Sequence[Episode], forks: Sequence[Branch]) -> Reading:
        flags, written = self._flags, self._answers(text, episodes, forks)
        known = bool(text.answer)
        verdicts = [answer[: len(text.answer)] == text.answer if known else answer for answer in written]
        rewards = []
        for one, answer, verdict, share in zip(episodes, written, verdicts, shares_alike(verdicts), strict=True):
            worth = float(verdict is True) if known else share
            if known and self.how.worth is not None:
                worth = self.how.worth(text.question, text.answer, answer)
            rewards.append(worth_of_end(worth, share, flags) - flags.rl_action_cost * one.cost)
        advantages, names = over_mean(rewards), AGENT_ACTIONS.names()
        ways = tuple(
            Way(
                tuple(names[decision.action] for decision in one.decisions),
                answer,
                verdict is True if known else None,
                reward,
                advantage,
                one.cost,
                one.memory.entries,
                one.memory.summaries,
                branch.nbytes,
            )
            for one, branch, answer, verdict, reward, advantage in zip(
                *(episodes, forks, written, verdicts, rewards, advantages), strict=True
            )
        )
        best = max(range(len(ways)), key=lambda n: ways[n].advantage)
        accepted = best if ways[best].advantage >= self.how.threshold else None
        for n, branch in enumerate(forks):
            if n == accepted:
                branch.commit()
            else:
                branch.rollback()
        return Reading(ways, best, accepted, sum(way.advantage >= self.how.threshold for way in ways))

    def _answers(self, text: Text, episodes: Sequence[Episode], forks: Sequence[Branch]) -> list[Tokens]:
        """What each branch writes behind its window and the question, in a branch of its own that nobody keeps; equal
        windows are read once."""
        known: dict[Tokens, Tokens] = {}
        for one, branch in zip(episodes, forks, strict=True):
            if one.window not in known:
                known[one.window] = self._written(branch.fork(), (*one.window, *text.question))
        return [known[one.window] for one in episodes]

    def _written(self, branch: Branch, seen: Tokens) -> Tokens:
        tokens: list[int] = []
        scores = branch.read(seen)
        while len(tokens) < self.how.most_tokens:
            drawn = torch.zeros(1, dtype=torch.long, device=self.model.ctx.device)
            if scores is not None:
                drawn = scores.argmax(-1)
            tell_stages(self.model.ctx, drawn, self.reader.last_rank)
            if int(drawn) == self.how.end:
                break
            tokens.append(int(drawn))
            scores = branch.read(tokens[-1:])
        return tuple(tokens)


def mean_numbers(readings: Sequence[Reading]) -> dict[str, float]:
    """Of many texts: the share of right answers among the best ways, their actions that cost something and bytes of
    memory; and the share of all branches that might have been accepted."""
    best = [one.best for one in readings]
    return {
        "accuracy": sum(way.right is True for way in best) / len(best),
        "actions": sum(way.cost for way in best) / len(best),
        "memory_bytes": sum(way.nbytes for way in best) / len(best),
        "accepted": sum(one.acceptable for one in readings) / sum(len(one.ways) for one in readings),
    }
