"""Groups whose members are all worth the same teach nothing: they are drawn again, of other examples (dynamic sampling
of DAPO, Yu et al., arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from megaforge.config.rl_config import ReinforcementConfig
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext

T = TypeVar("T")
_FURTHER = 1 << 32  # examples between those of one attempt and the next: more than a run has groups


def example_of(sample: int, group_size: int, attempt: int = 0) -> int:
    """The number of the example that a sample is asked, the first time and again."""
    return sample // group_size + attempt * _FURTHER


def equal_groups(rewards: Mapping[int, float], group_size: int) -> set[int]:
    """The numbers of groups whose members are all worth the same; ``rewards`` by samples, of whole groups."""
    grouped = groupby(sorted(rewards.items()), key=lambda one: one[0] // group_size)
    return {number for number, own in grouped if len({reward for _, reward in own}) == 1}


def drawn(
    ctx: ParallelContext,
    flags: ReinforcementConfig,
    samples: Sequence[int],
    draw: Callable[[Sequence[int], int], Mapping[int, T]],
    worth: Callable[[T], float],
) -> tuple[dict[int, T], dict[int, int]]:
    """What ``draw(samples, attempt)`` gives, by samples, where groups of equal worth are drawn again, up to
    ``--rl-resample`` times; and how often each was. Collective: each rank draws its own samples, all know all rewards.
    """
    found, tries = dict(draw(samples, 0)), dict.fromkeys(samples, 0)
    for attempt in range(1, flags.rl_resample + 1):
        told = exchange(ctx, {sample: worth(one) for sample, one in found.items()})
        rewards = {sample: reward for own in told for sample, reward in own.items()}
        equal = equal_groups(rewards, flags.rl_group_size)
        if not equal:
            break
        again = [sample for sample in samples if sample // flags.rl_group_size in equal]
        found |= draw(again, attempt)
        tries |= dict.fromkeys(again, attempt)
    return found, tries
