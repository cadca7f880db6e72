"""How much better an episode, or a decision in it, went than expected: group-relative (GRPO) and by a value function
(generalised advantage estimation). Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

import torch
from torch import Tensor

from megaforge.config.rl_config import ReinforcementConfig


def group_advantages(rewards_NG: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Of each episode of groups that were asked the same: reward less the group's mean, over its standard deviation
    (Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1; n - 1 below the root, as in verl's ``core_algos``).

    Args:
        rewards_NG: [groups, episodes of each]; one episode has nothing to be compared with, and gets 0.
        scale: False leaves the deviation out (Dr. GRPO, Liu et al., arXiv 2503.20783).

    Returns:
        The shape and dtype of ``rewards_NG``.
    """
    centred = rewards_NG - rewards_NG.mean(1, keepdim=True)
    if not scale or rewards_NG.shape[1] == 1:
        return centred
    return centred / (rewards_NG.std(1, keepdim=True) + eps)


def over_mean(rewards: Sequence[float]) -> list[float]:
    """Of each, how far it is above the mean of all: 0 where it is the mean exactly, as a threshold of 0 needs."""
    return [fsum(term for other in rewards for term in (one, -other)) / len(rewards) for one in rewards]


def varied(rewards_NG: Tensor) -> Tensor:
    """Bool [groups], where episodes differ in reward; others teach nothing (DAPO, Yu et al., arXiv 2503.14476)."""
    return rewards_NG.amax(1) > rewards_NG.amin(1)


def loss_weights(rewards_N: Tensor, lengths_N: Tensor, flags: ReinforcementConfig, longest: int) -> Tensor:
    """Of each decision of each of N episodes, fp64 [N]: sums over decisions, divided by N, are the mean that
    ``--rl-mean`` asks for, of the groups that count.

    Args:
        rewards_N: of episodes, members of a group behind each other.
        lengths_N: their decisions.
        longest: decisions of an episode, at most: the divisor of Dr. GRPO (arXiv 2503.20783).
    """
    counts, lengths = torch.ones_like(rewards_N, dtype=torch.float64), lengths_N.double()
    if flags.rl_drop_equal_groups:
        counts = varied(rewards_N.view(-1, flags.rl_group_size)).double().repeat_interleave(flags.rl_group_size)
    number = len(rewards_N)
    if flags.rl_mean == "decision":
        return counts * number / (counts * lengths).sum().clamp(min=1)
    return counts * (number / counts.sum().clamp(min=1)) / (lengths if flags.rl_mean == "episode" else longest)


def discounted_advantages(
    rewards_NT: Tensor,
    values_NT: Tensor,
    mask_NT: Tensor,
    *,
    gamma: float,
    lam: float,
    horizon: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage of each decision and the return that its value should have foretold (Schulman et al., arXiv
    1506.02438): A_t = sum over k of (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, and A + V.

    Args:
        rewards_NT: of each decision of each episode.
        values_NT: what was foretold before it; nothing is to come behind an episode's last decision.
        mask_NT: bool, which there are: the first ones of each row.
        horizon: how many decisions ahead are looked at; None: all.

    Returns:
        Both [N, T], zero where there is no decision.
    """
    there = mask_NT.to(values_NT.dtype)
    rewards, values = rewards_NT * there, values_NT * there
    advantages = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    deltas = rewards - values
    deltas[:, :-1] += gamma * values[:, 1:]
    for step in reversed(range(values.shape[1])):
        ahead = deltas[:, step] * there[:, step] + gamma * lam * ahead
        advantages[:, step] = ahead
    if horizon is not None and horizon < values.shape[1]:
        advantages[:, :-horizon] -= (gamma * lam) ** horizon * advantages[:, horizon:].clone()
    advantages = advantages * there
    return advantages, advantages + values


def whitened(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """``x`` where ``mask`` is set, brought to mean 0 and variance 1 (n - 1 below it, as in verl); 0 elsewhere."""
    there = mask.to(x.dtype)
    count = there.sum()
    centred = (x - (x * there).sum() / count.clamp(min=1)) * there
    if count < 2:
        return centred
    return centred * torch.rsqrt((centred**2).sum() / (count - 1) + eps)
