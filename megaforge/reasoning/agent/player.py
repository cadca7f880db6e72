"""Plays episodes: what a policy chooses, from what the model sees. Reading contexts of all chunks are seen at once, as
long as no window changes; equal ones of any episodes once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megaforge.reasoning.agent.episode import Context, Episode, Seen
from megaforge.reasoning.agent.heads import AgentHeads
from megaforge.reasoning.agent.reader import Reader


class Policy(Protocol):
    """What chooses."""

    def __call__(self, heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
        """The actions, int64 [n], of n episodes.

        Args:
            hidden, flags, memory: as in :meth:`AgentHeads.opinion`.
            draws: uniform numbers [n].
        """


def sampled(heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
    """As probable as the policy says."""
    probabilities = heads.opinion(hidden, flags, memory).log_probs.double().exp()
    below = probabilities.cumsum(-1) / probabilities.sum(-1, keepdim=True) <= draws[:, None].double()
    last = (probabilities > 0).long() * torch.arange(1, probabilities.shape[-1] + 1)
    return torch.minimum(below.sum(-1), last.amax(-1) - 1)


def greedy(heads: AgentHeads, hidden: Tensor, flags: Tensor, memory: Tensor, draws: Tensor) -> Tensor:
    """The most probable action."""
    return heads.opinion(hidden, flags, memory).log_probs.argmax(-1)


def draws_of(seed: int, sample: int, round_: int, count: int, attempt: int = 0) -> Tensor:
    """``count`` uniform numbers in [0, 1): of a seed, a sample, a round and how often it was drawn before alone,
    whatever the layout."""
    key = np.array([seed % 2**64, 0x6167656E74], dtype=np.uint64)
    counter = np.array([0, attempt, sample % 2**64, round_ % 2**64], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count))


@torch.no_grad()
def play(episodes: Sequence[Episode], reader: Reader, policy: Policy, seed: int, round_: int, attempt: int = 0) -> None:
    """Plays episodes to their end, verdicts included. Collective: every rank plays those of its samples, and goes on as
    long as any does.

    Raises:
        UserError: a context is longer than a row.
    """
    most = max((len(one.chunks) + one.setting.answer_steps for one in episodes), default=0)
    draws = [draws_of(seed, episode.sample, round_, most, attempt) for episode in episodes]
    seen: dict[Context, Seen] = {}
    while True:
        wanted = [context for one in episodes if one.verdict is None for context in _wanted(one) if context not in seen]
        more = reader.read(list(dict.fromkeys(wanted)))
        if more is None:
            return
        seen.update(more)
        while ready := [n for n, one in enumerate(episodes) if not one.decided and one.context() in seen]:
            _decide([episodes[n] for n in ready], [draws[n] for n in ready], seen, reader.heads, policy)
        for one in episodes:
            if one.decided and (context := one.context()) in seen:
                one.verdict = seen[context].right


def _wanted(episode: Episode) -> list[Context]:
    return [episode.context()] if episode.answering else episode.contexts()


def _decide(
    episodes: Sequence[Episode], draws: Sequence[Tensor], seen: dict[Context, Seen], heads: AgentHeads, policy: Policy
) -> None:
    """One decision of each."""
    now = [seen[episode.context()] for episode in episodes]
    memory = torch.stack([one.memory.vector(found.key) for one, found in zip(episodes, now, strict=True)])
    flags = torch.tensor([episode.flags for episode in episodes])
    drawn = torch.stack([own[len(one.decisions)] for one, own in zip(episodes, draws, strict=True)])
    actions = policy(heads, torch.stack([found.hidden for found in now]), flags, memory, drawn)
    for one, found, read, action in zip(episodes, now, memory, actions.tolist(), strict=True):
        one.decide(found, read, action)
