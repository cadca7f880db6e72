"""What an agent's answers are worth: written by the most likely tokens, and the same at every layout."""

from __future__ import annotations

import pytest
import torch

from megaforge.data.task_tokenizer import make_task_tokenizer
from megaforge.data.tokenizer import load_tokenizer
from megaforge.reasoning.agent.answers import AnswerWorth
from megaforge.reasoning.agent.episode import Context, Episode, Setting
from megaforge.reasoning.agent.player import greedy, play
from megaforge.reasoning.agent.texts import TaskTexts
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.reasoning.test_agent import objective_of
from tests.reasoning.test_agent_parity import LAYOUTS, agent_arguments, steps
from tests.training.tiny import make_config, make_trainer

SHORT = """
from megaforge.registry import REWARDS


def early(question, written):
    values = written.split()
    assert question.prompt.startswith("ask") and 1 <= len(values) <= len(question.answer.split()) == 4, written
    return sum(len(value) for value in values) / 16


REWARDS.register("early", early)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Answers have four words; they are worth what a user's file says."""
    folder = tmp_path_factory.mktemp("words")
    make_task_tokenizer(["recall_chunks"], str(folder / "words.json"))
    (folder / "early.py").write_text(SHORT)
    more = ("--data-path", "tasks://recall_chunks", "--extensions", str(folder / "early.py"))
    return agent_arguments(folder / "words.json", *more, "--rl-reward", "exact=2", "early=0.5", "--rl-algorithm", "ppo")


def test_answers_are_what_the_model_writes_by_itself(flags: list[str]) -> None:
    """Each token against the scores of all that is before it, by the model alone."""
    trainer = make_trainer(flags)
    perturb(trainer.model, trainer.ctx, 0.3)
    objective = objective_of(trainer)
    reader, texts = objective.reader(trainer), TaskTexts(trainer.config)
    reader.share_heads()
    episodes = [Episode(k, texts.of(k), objective.new_memory(torch.float64), Setting(12, 4, 4)) for k in range(5)]
    play(episodes, reader, greedy, 1, 0)
    episodes[3].verdict = True
    worth = AnswerWorth(trainer.config, texts.tokenizer)
    worth.give(episodes, reader)
    found, expected = [one.worth for one in episodes], []
    for one in episodes:
        written: list[int] = []
        while len(written) < len(one.answer) and not one.verdict:
            seen = torch.tensor([[*one.window, *one.question, *written]])
            token = int(trainer.model.logits(seen)[0, -1].argmax())
            if token == texts.tokenizer.eod:
                break
            written.append(token)
        text = texts.tokenizer.decode(list(one.answer if one.verdict else written))
        expected.append(2.0 * bool(one.verdict) + 0.5 * sum(map(len, text.split())) / 16)
    assert found == pytest.approx(expected, rel=1e-12) and found[3] > 2
    context = Context((3, 4, 5), (0, 0), 2)
    assert reader.following([context]) == {
        context: int(trainer.model.logits(torch.tensor([[3, 4, 5]]))[0, -1].argmax())
    }
    assert reader.following([]) is None


def test_a_step_is_the_same_at_every_layout(ranks: RankPool, flags: list[str]) -> None:
    expected = train(flags)
    first = steps(expected)[0]
    assert first["reward"] > 2 * first["accuracy"] - 0.01 * first["actions"] + 0.1, "some of a wrong answer is worth it"
    compare(ranks.run(4, train, [*flags, *LAYOUTS["tp2 x pp2"]]), expected, 1e-10)


def test_a_verdict_is_what_exact_says(flags: list[str]) -> None:
    """By default nothing is written."""
    words = load_tokenizer("HuggingFaceTokenizer", flags[flags.index("--tokenizer-model") + 1])
    question, answer = tuple(words.encode("ask k1")), tuple(words.encode("v1 v2"))
    for more, right in ((), 1.0), (("--rl-reward", "exact=3"), 3.0):
        worth = AnswerWorth(make_config([*flags, "--rl-reward", "exact", *more]), words)
        assert worth.verdict_says_it
        assert worth.of(question, answer, answer) == right == worth.of(question, answer, (*answer, 5))
        assert worth.of(question, answer, answer[:1]) == worth.of(question, answer, ()) == 0
    worth = AnswerWorth(make_config([*flags, "--rl-reward", "number", "exact"]), words)
    assert not worth.verdict_says_it and worth.of(question, answer, answer) == 2
