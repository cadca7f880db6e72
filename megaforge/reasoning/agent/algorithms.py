"""What episodes are worth, decision by decision; each algorithm is in :data:`megaforge.registry.RL_ALGORITHMS`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megaforge.config.rl_config import ReinforcementConfig
from megaforge.reasoning.advantages import discounted_advantages, group_advantages, loss_weights, varied, whitened


class Played(NamedTuple):
    """What the ranks tell each other of an episode.

    Attributes:
        sample: its number.
        right: its verdict.
        costs: of each decision, 1 or 0.
        values: what was foretold at each decision.
        worth: what its answer is worth (``--rl-reward``); None: 1 for a right one.
    """

    sample: int
    right: bool
    costs: tuple[int, ...]
    values: tuple[float, ...]
    worth: float | None = None


class Judged(NamedTuple):
    """What an episode teaches: its reward; of each decision the advantage, the return that the value is to foretell,
    and how much it counts; and whether all of its group have the same reward."""

    reward: float
    advantages: tuple[float, ...]
    returns: tuple[float, ...]
    weight: float
    alike: bool


class Algorithm(Protocol):
    """
    Attributes:
        learns_value: whether the value is trained.
    """

    learns_value: bool

    def advantages(self, rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns [N, T] of all episodes of the global batch, members of a group behind each other."""


class GroupRelative:
    """GRPO: an episode's whole reward beside its group's (:func:`megaforge.reasoning.advantages.group_advantages`)."""

    learns_value = False

    def __init__(self, flags: ReinforcementConfig) -> None:
        self._size, self._scale = flags.rl_group_size, flags.rl_scale_advantages

    def advantages(self, rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
        whole = rewards_NT.sum(1)
        found = group_advantages(whole.view(-1, self._size), scale=self._scale).flatten()
        there = mask_NT.to(rewards_NT.dtype)
        return found[:, None] * there, whole[:, None] * there


class ProximalPolicy:
    """PPO: generalised advantages by the value, brought to mean 0 and variance 1 over the global batch."""

    learns_value = True

    def __init__(self, flags: ReinforcementConfig) -> None:
        self._flags = flags

    def advantages(self, rewards_NT: Tensor, values_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
        flags = self._flags
        found, returns = discounted_advantages(
            *(rewards_NT, values_NT, mask_NT), gamma=flags.rl_gamma, lam=flags.rl_lambda, horizon=flags.rl_horizon
        )
        return whitened(found, mask_NT), returns


def judge(played: Sequence[Played], flags: ReinforcementConfig, algorithm: Algorithm) -> dict[int, Judged]:
    """What the episodes of a global batch teach, by their numbers. Every rank computes it from the same numbers.

    The reward is what the answer is worth, less the cost of actions, and what stability gives: the share of an
    episode's group that ends as it does. All but the cost comes with the last decision.
    """
    played = sorted(played)
    most = max(len(one.costs) for one in played)
    rewards, values = torch.zeros(2, len(played), most, dtype=torch.float64)
    mask = torch.zeros(len(played), most, dtype=torch.bool)
    shares = _alike(played, flags.rl_group_size)
    for row, (one, share) in enumerate(zip(played, shares, strict=True)):
        length = len(one.costs)
        rewards[row, :length] = -flags.rl_action_cost * torch.tensor(one.costs, dtype=torch.float64)
        worth = float(one.right) if one.worth is None else one.worth
        rewards[row, length - 1] += worth_of_end(worth, share, flags)
        values[row, :length], mask[row, :length] = torch.tensor(one.values, dtype=torch.float64), True
    advantages, returns = algorithm.advantages(rewards, values, mask)
    groups = rewards.sum(1).view(-1, flags.rl_group_size)
    alike = (~varied(groups)).repeat_interleave(flags.rl_group_size)
    weights = loss_weights(rewards.sum(1), mask.sum(1), flags, flags.agent_steps)
    return {
        one.sample: Judged(
            float(rewards[row].sum()),
            tuple(advantages[row, : len(one.costs)].tolist()),
            tuple(returns[row, : len(one.costs)].tolist()),
            float(weights[row]),
            bool(alike[row]),
        )
        for row, one in enumerate(played)
    }


def _alike(played: Sequence[Played], size: int) -> list[float]:
    """Of each episode the share of its group that ends as it does."""
    shares: list[float] = []
    for _, group in groupby(played, key=lambda one: one.sample // size):
        shares += shares_alike([one.right for one in group])
    return shares


def shares_alike(verdicts: Sequence[object]) -> list[float]:
    """Of each the share of all that are as it is."""
    return [verdicts.count(verdict) / len(verdicts) for verdict in verdicts]


def worth_of_end(worth: float, share: float, flags: ReinforcementConfig) -> float:
    """What an episode's end gives, without the cost of actions: what its answer is worth, and stability, where
    ``share`` of the group ended alike."""
    return worth + flags.rl_stability * share
