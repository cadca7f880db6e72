"""Flags of rewards: what a written answer is worth to reinforcement learning."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError
from megaforge.registry import REWARDS


@dataclass(frozen=True)
class RewardConfig:
    """What a written answer is worth (reinforcement learning)."""

    rl_reward: tuple[str, ...] = flag(
        ("exact",),
        "what an answer is worth: NAME or NAME=WEIGHT each, added up: exact (the same text), number, choice, boxed, "
        "format (see --rl-format), or one that a file of --extensions registers",
        metavar="NAME[=WEIGHT]",
    )
    rl_format: str | None = flag(
        None, "--rl-reward format: a regular expression that is to be found in an answer", metavar="REGEX"
    )

    @property
    def rewards(self) -> dict[str, float]:
        """Weights by the names of rewards."""
        found = {}
        for one in self.rl_reward:
            name, equals, weight = one.partition("=")
            try:
                found[name] = float(weight) if equals else 1.0
            except ValueError:
                found[name] = math.nan
        return found

    def validate(self) -> None:
        """
        Raises:
            UserError: no reward, one that nobody knows, one that is named twice, a weight that is no number, or a bad
                expression.
        """
        shown, found = f"--rl-reward {' '.join(self.rl_reward)}", self.rewards
        if len(found) != len(self.rl_reward) or not found:
            raise UserError(f"{shown}: name each reward once, at least one, such as exact")
        for name, weight in found.items():
            try:
                REWARDS.check(name)
            except UserError as error:
                raise UserError(f"{shown}: {error}") from error
            if not math.isfinite(weight):
                raise UserError(f"{shown}: the weight of {name} is not a number; write {name}=0.5")
        try:
            re.compile(self.rl_format or "")
        except re.error as error:
            raise UserError(f"--rl-format {self.rl_format}: it is not a regular expression ({error})") from error
