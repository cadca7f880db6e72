"""What written answers are worth: our rewards, a user's own, and how they add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.reward_config import RewardConfig
from megaforge.errors import UserError
from megaforge.reasoning.rewards import Rewards, boxed, choice, exact, number
from megaforge.registry import REWARDS, Registry, load_extensions
from megaforge.tasks.questions import Question

SUM = Question("6*7?", "42", "It is 6*7.\n#### 42", place="q.jsonl: line 3")
TEST = Question("?", "B", choices=("a dog", "a cat"))
HALF = Question("?", r"\frac{1}{2}")


@pytest.mark.parametrize(
    ("reward", "question", "written", "worth"),
    [
        (exact, SUM, " 42\n", 1),
        (exact, SUM, "#### 42", 0),
        (exact, SUM, "", 0),
        (number, SUM, "It is 6*7=<<6*7=42>>42.\n#### 42", 1),
        (number, SUM, "$42.00 dollars", 1),
        (number, SUM, "#### 42 (not 43)", 0),  # the last behind the mark
        (number, SUM, "42 #### 41", 0),
        (number, SUM, "42 ####", 0),
        (number, SUM, "forty-two", 0),
        (number, Question("?", "none"), "none", 0),
        (choice, TEST, "B", 1),
        (choice, TEST, "The answer is (B).", 1),
        (choice, TEST, "a  cat", 1),
        (choice, TEST, "a dog", 0),
        (choice, TEST, "", 0),
        (choice, Question("?", "B"), "B", 1),
        (boxed, HALF, r"so \boxed{\dfrac{1}{2}}", 1),
        (boxed, HALF, r"\frac{1}{2}", 0),
        (boxed, HALF, r"\boxed{}", 0),
        (boxed, Question("?", "1,000"), r"\boxed{1000.0}", 1),
        (boxed, Question("?", "x"), r"\boxed{y}", 0),
    ],
)
def test_what_an_answer_is_worth(
    reward: Callable[[Question, str], float], question: Question, written: str, worth: float
) -> None:
    assert reward(question, written) == worth


def test_rewards_add_up_by_their_weights() -> None:
    flags = RewardConfig(("number", "format=0.25", "exact=-2"), r"^so.*#### \d+$")
    flags.validate()
    rewards = Rewards(flags)
    assert rewards.parts(SUM, "so\n#### 42") == {"number": 1, "format": 1, "exact": 0}
    assert rewards(SUM, "so\n#### 42") == 1.25 and rewards(SUM, "42") == -1 and rewards(SUM, "") == 0


def test_a_users_reward_by_a_file_and_by_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Registry("reward", {"exact": "megaforge.reasoning.rewards:exact"}, entry_points="megaforge.rewards")
    for place in ("megaforge.registry", "megaforge.reasoning.rewards", "megaforge.config.reward_config"):
        monkeypatch.setattr(f"{place}.REWARDS", mine)
    file = tmp_path / "brief.py"
    file.write_text(
        "from megaforge.registry import REWARDS\n"
        "def brief(question, written):\n    return 1 / (1 + len(written))\n"
        "REWARDS.register('brief', brief)\n"
    )
    load_extensions((str(file),))
    point = EntryPoint("theirs", "megaforge.reasoning.rewards:number", "megaforge.rewards")
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [point] if group == "megaforge.rewards" else []
    )
    flags = RewardConfig(("brief=2", "theirs"))
    flags.validate()
    assert Rewards(flags)(SUM, "42") == 2 / 3 + 1


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_a_reward_that_is_no_number_is_named(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Registry("reward", {})
    mine.register("odd", lambda question, written: value)
    monkeypatch.setattr("megaforge.reasoning.rewards.REWARDS", mine)
    with pytest.raises(UserError, match=r"--rl-reward odd: it gave .* of q\.jsonl: line 3"):
        Rewards(RewardConfig(("odd",)))(SUM, "42")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (RewardConfig(()), "name each reward once, at least one"),
        (RewardConfig(("exact", "exact=2")), "name each reward once"),
        (RewardConfig(("exakt",)), "did you mean exact"),
        (RewardConfig(("exact=",)), "the weight of exact is not a number; write exact=0.5"),
        (RewardConfig(("exact=inf",)), "the weight of exact is not a number"),
        (RewardConfig(("format",), "("), "it is not a regular expression"),
    ],
)
def test_bad_flags_are_named(flags: RewardConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        flags.validate()
    assert "exact" in REWARDS
