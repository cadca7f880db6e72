"""What a written answer is worth to reinforcement learning.

A reward is ``reward(question, written) -> float``, registered by its name::

    from megaforge.registry import REWARDS

    def brief(question, written):
        return 1.0 if len(written) < 100 else 0.0

    REWARDS.register("brief", brief)

in a file of ``--extensions``, or by an entry point of the group ``megaforge.rewards``. A reward that needs flags has a
class method ``of(flags)``, which makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Protocol

from megaforge.config.reward_config import RewardConfig
from megaforge.errors import UserError
from megaforge.registry import REWARDS
from megaforge.tasks.answers import MARK, chosen_letter, last_box, last_number, result, same_formula
from megaforge.tasks.questions import Question


class Reward(Protocol):
    """What one kind of reward says."""

    def __call__(self, question: Question, written: str) -> float:
        """Of an answer that was ``written``: 1 where it is as it should be, 0 where not; or anything between and
        beyond."""


def exact(question: Question, written: str) -> float:
    """1 where the text is the answer, whatever the spaces between words."""
    return float(written.split() == question.answer.split())


def number(question: Question, written: str) -> float:
    """1 where the text's number is the answer's: the last one behind ``####``, or of all (GSM8K). 18, $18.00 and 18
    dollars are one."""
    found = last_number(result(written) if MARK in written else written)
    wanted = last_number(question.answer)
    return float(found is not None and found == wanted)


def choice(question: Question, written: str) -> float:
    """1 where the text chooses the right letter, or is the right choice word by word."""
    answer = question.answer.strip()
    if question.choices and written.split() == question.choices[ord(answer) - ord("A")].split():
        return 1.0
    return float(chosen_letter(written) == answer)


def boxed(question: Question, written: str) -> float:
    r"""1 where what is in the text's last ``\boxed{}`` is the answer: the same formula but for looks, or the same
    number (MATH)."""
    box = last_box(written)
    return float(box is not None and same_formula(box, question.answer))


class Format:
    """1 where a regular expression is found in the text (``--rl-format``); ``.`` is any character, line ends too."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern, re.DOTALL)

    @classmethod
    def of(cls, flags: RewardConfig) -> Format:
        """That of ``--rl-format``."""
        assert flags.rl_format is not None, "a partner rule asks for it"
        return cls(flags.rl_format)

    def __call__(self, question: Question, written: str) -> float:
        return float(self._pattern.search(written) is not None)


class Rewards:
    """What the flags ask for, added up.

    Attributes:
        weights: by the names of rewards.
    """

    def __init__(self, flags: RewardConfig) -> None:
        """
        Raises:
            UserError: no reward has one of the names.
        """
        self.weights: Mapping[str, float] = flags.rewards
        self._parts: dict[str, Reward] = {}
        for name in self.weights:
            part = REWARDS.get(name)
            self._parts[name] = part.of(flags) if hasattr(part, "of") else part

    def parts(self, question: Question, written: str) -> dict[str, float]:
        """What each says, without its weight.

        Raises:
            UserError: one says what is not a finite number.
        """
        found = {}
        for name, part in self._parts.items():
            value = part(question, written)
            if not isinstance(value, int | float) or not math.isfinite(value):
                at = f" of {question.place}" if question.place else ""
                raise UserError(f"--rl-reward {name}: it gave {value!r}{at}, where a finite number is needed")
            found[name] = float(value)
        return found

    def __call__(self, question: Question, written: str) -> float:
        """What an answer is worth: the sum of what each says times its weight."""
        return math.fsum(self.weights[name] * value for name, value in self.parts(question, written).items())
