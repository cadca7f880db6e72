"""The agent's parts: what actions do to an episode, what contexts are packed as, what the model sees of them, what
episodes are worth, and a run that is killed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.config.rl_config import ReinforcementConfig
from megaforge.errors import UserError
from megaforge.monitor.names import known
from megaforge.reasoning.agent.algorithms import GroupRelative, Played, ProximalPolicy, judge
from megaforge.reasoning.agent.control import AgentControl
from megaforge.reasoning.agent.episode import Context, Episode, Seen, Setting, pack_contexts
from megaforge.reasoning.agent.experience import Record
from megaforge.reasoning.agent.heads import AgentHeads
from megaforge.reasoning.agent.objective import AgentObjective
from megaforge.reasoning.agent.player import draws_of, greedy, play, sampled
from megaforge.reasoning.agent.texts import TaskTexts
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.packing import as_batch, rounded
from megaforge.reasoning.reference import without_adapters
from megaforge.training.callbacks import callback_of
from megaforge.training.trainer import Trainer
from tests.nn.support import perturb
from tests.reasoning.test_agent_parity import agent_arguments
from tests.training.tiny import goes_on_alike, make_trainer

SUMMARIZE, WRITE, RETRIEVE, SPLICE = range(4)
CHUNKS, QUESTION, ANSWER = ((11, 12), (21, 22), (31, 32)), (7,), (9, 8)


def episode(window: int = 3, steps: int = 2) -> Episode:
    memory = AgentMemory(MemoryShape(2, 2))
    return Episode(5, (CHUNKS, QUESTION, ANSWER), memory, Setting(window, steps, 2))


def seen(number: float) -> Seen:
    vector = torch.tensor([number, 1.0])
    return Seen(vector, vector, torch.stack([vector, vector]), False)


def does(one: Episode, *actions: int) -> None:
    for number, action in enumerate(actions):
        one.decide(seen(float(number)), torch.zeros(2), action)


def test_what_is_looked_up_comes_into_sight() -> None:
    one = episode()
    assert one.context() == Context((11, 12, 7), (0, 2), 2)
    assert [context.tokens for context in one.contexts()] == [(11, 12, 7), (21, 22, 7), (31, 32, 7), (7, 9, 8)]
    does(one, WRITE, SUMMARIZE)
    assert (one.memory.entries, one.memory.summaries, one.flags) == (1, 2, (0.0, 1.0, 0.0, 0.0))
    does(one, RETRIEVE)
    assert one.answering and not one.decided and one.flags == (1.0, 1.0, 1.0, 0.0)
    does(one, SPLICE)
    assert one.decided and one.window == (11, 12) and one.cost == 3
    assert one.context() == Context((11, 12, 7, 9, 8), (2, 2), 2), "the answer is where nothing before it sees it"
    assert [decision.action for decision in one.decisions] == [WRITE, SUMMARIZE, RETRIEVE, SPLICE]


def test_a_window_has_room_for_whole_chunks_and_slots_are_few() -> None:
    one = episode(window=3)
    does(one, WRITE, WRITE, WRITE, RETRIEVE, SPLICE)
    assert one.memory.entries == 2 and one.memory.evicted == 1
    assert one.window == (21, 22), "what is least like what the model sees now, of what is left"
    early = episode(window=4)
    does(early, WRITE, RETRIEVE, SPLICE)
    assert early.window == (11, 12) and early.decided, "with something in sight the answer follows the last chunk"
    assert early.decisions[-1].context.tokens == (31, 32, 7)


def test_decisions_behind_the_text_are_few() -> None:
    one = episode(steps=2)
    does(one, SUMMARIZE, SUMMARIZE, SUMMARIZE, RETRIEVE)
    assert not one.decided
    does(one, RETRIEVE)
    assert one.decided and one.window == ()
    none = episode(steps=0)
    does(none, *[SUMMARIZE] * 3)
    assert none.decided


def test_a_fork_goes_on_by_itself() -> None:
    one = episode()
    does(one, WRITE)
    other = one.fork()
    does(other, WRITE, RETRIEVE)
    assert (one.place, one.memory.entries, len(one.decisions)) == (1, 1, 1) and other.memory.entries == 2


def test_contexts_are_documents() -> None:
    contexts = [Context((1, 2, 3), (0, 1), 2), Context((4, 5), (0, 1), 1), Context((1, 2, 3), (0, 1), 2)]
    packed = pack_contexts(contexts, 5)
    assert packed.places == {contexts[0]: (0, 0), contexts[1]: (0, 3)} and packed.rows == 1
    assert pack_contexts([contexts[0], contexts[1]], 4).places[contexts[1]] == (1, 0)
    batch = as_batch(packed, 2, 6)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [0] * 6]
    assert batch.labels.tolist()[0] == [2, 3, 0, 5, 0, 0]
    assert batch.document_start.tolist()[0] == [True, False, False, True, False, True]
    assert not batch.loss_mask.any()
    assert pack_contexts([], 5).rows == 1
    with pytest.raises(UserError, match="--seq-length 2: the agent sees 3 tokens"):
        pack_contexts(contexts, 2)
    assert [rounded(n) for n in (1, 2, 7, 8, 9, 33, 64, 65)] == [1, 2, 7, 8, 10, 40, 64, 80]
    assert len({rounded(n) for n in range(1, 1025)}) < 45


def test_draws_are_of_the_sample_alone() -> None:
    first = draws_of(1, 2, 3, 5)
    assert torch.equal(first, draws_of(1, 2, 3, 9)[:5]) and ((first >= 0) & (first < 1)).all()
    assert len({float(draws_of(*key, 1)) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


class Fixed(AgentHeads):
    """Heads that say what they were told."""

    def __init__(self, log_probs: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.said = log_probs

    def opinion(self, *seen: Any) -> Any:
        from megaforge.reasoning.agent.heads import Opinion

        return Opinion(self.said, self.said, self.said[..., 0])


def test_actions_are_as_probable_as_the_policy_says() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.75, 0.0])
    draws = torch.linspace(0, 1, 401, dtype=torch.float64)[:-1]
    heads, nothing = Fixed(probabilities.log().expand(400, 4)), torch.zeros(400, 1)
    found = sampled(heads, nothing, nothing, nothing, draws)
    assert found.bincount(minlength=4).tolist() == [0, 100, 300, 0]
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampled(Fixed(probabilities.log().expand(2, 4)), nothing, nothing, nothing, edge).tolist() == [1, 2]
    assert set(greedy(heads, nothing, nothing, nothing, draws).tolist()) == {2}


FLAGS = ReinforcementConfig(rl_group_size=2, rl_action_cost=0.1, rl_stability=0.2)
PLAYED = [
    Played(2, True, (1, 0, 1), (0.5, 0.5, 0.5)),
    Played(0, True, (0,), (0.1,)),
    Played(1, True, (0, 0), (0.0, 0.2)),
    Played(3, False, (0, 1), (0.3, 0.4)),
]


def test_rewards_are_the_tasks_less_costs_and_what_stability_gives() -> None:
    judged = judge(PLAYED, FLAGS, GroupRelative(FLAGS))
    assert {k: one.reward for k, one in judged.items()} == pytest.approx({0: 1.2, 1: 1.2, 2: 0.9, 3: 0.0})
    assert judged[0].advantages == (0.0,) and judged[2].advantages == pytest.approx([math.sqrt(0.5)] * 3, rel=1e-5)
    assert judged[3].advantages == pytest.approx((-judged[2].advantages[0],) * 2)
    assert judged == judge(PLAYED[::-1], FLAGS, GroupRelative(FLAGS)), "whatever rank told what"
    ppo = judge(PLAYED, FLAGS, ProximalPolicy(FLAGS))
    rewards = [-0.1, 0.0, 0.9 + 0.1]
    deltas = [rewards[0] + 0.995 * 0.5 - 0.5, rewards[1] + 0.995 * 0.5 - 0.5, rewards[2] - 0.5]
    assert ppo[2].returns[2] == pytest.approx(1.0)
    assert ppo[2].returns[1] == pytest.approx(deltas[1] + 0.995 * 0.95 * deltas[2] + 0.5)
    whole = [x for one in ppo.values() for x in one.advantages]
    assert sum(whole) == pytest.approx(0, abs=1e-9) and sum(x * x for x in whole) == pytest.approx(len(whole) - 1)


@pytest.mark.parametrize(
    ("mean", "drop", "expected"),
    [
        ("episode", False, {0: 1.0, 1: 0.5, 2: 1 / 3, 3: 0.5}),
        ("decision", False, dict.fromkeys(range(4), 4 / 8)),
        ("constant", False, dict.fromkeys(range(4), 1 / 64)),
        ("episode", True, {0: 0.0, 1: 0.0, 2: 2 / 3, 3: 1.0}),
        ("decision", True, {0: 0.0, 1: 0.0, 2: 4 / 5, 3: 4 / 5}),
    ],
)
def test_what_the_loss_is_a_mean_of(mean: str, drop: bool, expected: dict[int, float]) -> None:
    """Sums of weighted decisions over the number of episodes, four, are that mean."""
    flags = dataclasses.replace(FLAGS, rl_mean=mean, rl_drop_equal_groups=drop)
    judged = judge(PLAYED, flags, GroupRelative(flags))
    assert {k: one.weight for k, one in judged.items()} == pytest.approx(expected)


def test_an_episode_needs_its_decisions() -> None:
    with pytest.raises(UserError, match="--agent-steps 8: 16 chunks and 4 decisions behind them need 20"):
        dataclasses.replace(FLAGS, agent_steps=8).validate()


def objective_of(trainer: Trainer) -> AgentObjective:
    assert isinstance(trainer.objective, AgentObjective)
    return trainer.objective


def test_the_model_sees_contexts_as_documents_of_their_own(words: Path) -> None:
    """Hidden vectors, summaries and verdicts are those of the model on each context alone."""
    trainer = make_trainer(agent_arguments(words, "--memory-stride", "4", "--micro-batch-size", "2"))
    perturb(trainer.model, trainer.ctx, 0.3)
    reader = objective_of(trainer).reader(trainer)
    reader.share_heads()
    random = torch.Generator().manual_seed(0)
    contexts = []
    for size, chunk, last in ((9, (2, 8), 8), (5, (0, 3), 3), (23, (1, 11), 20), (2, (0, 0), 0), (40, (0, 39), 39)):
        contexts.append(Context(tuple(torch.randint(0, 100, (size,), generator=random).tolist()), chunk, last))
    first = trainer.model.logits(torch.tensor([contexts[3].tokens[:1]]))[0, -1].argmax()
    contexts[3] = contexts[3]._replace(tokens=(contexts[3].tokens[0], int(first)))
    found = reader.read(contexts)
    assert found is not None and found[contexts[3]].right and not found[contexts[2]].right
    for context in contexts:
        tokens = torch.tensor([context.tokens])
        hidden = trainer.model.head_input(tokens, trainer.model.pack(tokens, None))[:, 0]
        torch.testing.assert_close(found[context].hidden, hidden[context.last], rtol=1e-9, atol=1e-12)
        means = [hidden[a : min(a + 4, context.chunk[1])].mean(0) for a in range(context.chunk[0], context.chunk[1], 4)]
        down = reader.heads.summariser.down
        assert len(found[context].summaries) == len(means)
        for ours, mean in zip(found[context].summaries, means, strict=True):
            torch.testing.assert_close(ours, down(mean), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[context].key, down(hidden[context.last]), rtol=1e-9, atol=1e-12)
    assert reader.read([]) is None


def test_playing_is_what_one_decision_after_the_other_does(words: Path) -> None:
    trainer = make_trainer(agent_arguments(words))
    perturb(trainer.model, trainer.ctx, 0.3)
    objective = objective_of(trainer)
    reader, texts = objective.reader(trainer), TaskTexts(trainer.config)
    reader.share_heads()
    setting = Setting(12, 4, 4)
    played = [Episode(k, texts.of(k // 4), objective.new_memory(torch.float64), setting) for k in range(8)]
    play(played, reader, sampled, 1234, 0)
    again = [Episode(k, texts.of(k // 4), objective.new_memory(torch.float64), setting) for k in range(8)]
    for one in again:
        draws = draws_of(1234, one.sample, 0, 8)
        while not one.decided:
            context = one.context()
            now = reader.read([context])[context]  # type: ignore[index]
            memory = one.memory.vector(now.key)
            given = (now.hidden[None], torch.tensor([one.flags]), memory[None], draws[len(one.decisions)][None])
            one.decide(now, memory, int(sampled(reader.heads, *given)))
        one.verdict = reader.read([one.context()])[one.context()].right  # type: ignore[index]
    for ours, theirs in zip(played, again, strict=True):
        assert [d.action for d in ours.decisions] == [d.action for d in theirs.decisions]
        assert (ours.verdict, ours.window) == (theirs.verdict, theirs.window)
        assert ours.memory.entries == theirs.memory.entries


def test_episodes_of_several_steps_are_kept_as_they_were(words: Path) -> None:
    trainer = make_trainer(agent_arguments(words, "--rl-epochs", "2", "--train-iters", "1"))
    trainer.train()
    control = callback_of(trainer.callbacks, AgentControl)
    state = control.state()
    other = AgentControl(trainer)
    other.load_state(state)
    assert other.state() == state and len(state["kept"]) == 16
    for sample, kept in control.kept.items():
        for ours, theirs in zip(kept.decisions, other.kept[sample].decisions, strict=True):
            assert ours[:2] == theirs[:2] and torch.equal(ours.memory, theirs.memory) and ours.action == theirs.action
    assert isinstance(next(iter(other.kept.values())), Record)


@pytest.mark.parametrize("more", [("--rl-epochs", "3"), ("--peft", "lora", "--lora-rank", "2", "--lora-dropout", "0")])
def test_a_run_that_is_killed_goes_on_as_if_it_was_not(words: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    argv = agent_arguments(words, "--train-iters", "4", "--rl-kl-target", "0.01", "--rl-kl-limit", "1e-4", *more)
    told = goes_on_alike(argv, tmp_path)
    assert told[-1]["policy_lr_factor"] < 1
    assert all(known("step", name) for name in {*told[0]} - {"kind", "iteration"})


def test_the_model_without_adapters_is_the_one_before(words: Path) -> None:
    trainer = make_trainer(agent_arguments(words, "--peft", "lora", "--lora-rank", "2", "--lora-dropout", "0"))
    plain = make_trainer(agent_arguments(words))
    tokens = torch.arange(12)[None]
    expected = plain.model.logits(tokens)
    assert torch.equal(trainer.model.logits(tokens), expected)
    perturb(trainer.model, trainer.ctx, 0.0)
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("lora.B"):
            parameter.data.fill_(0.1)
    assert not torch.allclose(trainer.model.logits(tokens), expected)
    with without_adapters(trainer.model):
        assert torch.equal(trainer.model.logits(tokens), expected)
    assert not torch.allclose(trainer.model.logits(tokens), expected)


def test_a_collapsed_policy_ends_the_run_or_goes_back(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = agent_arguments(words, "--rl-kl-collapse", "1e-9", "--train-iters", "3")
    with pytest.raises(UserError, match="iteration 2: .* the policy has collapsed; go on from an earlier checkpoint"):
        make_trainer(argv).train()
    capsys.readouterr()
    with pytest.raises(UserError, match="has gone back to iteration 0 3 times already"):
        make_trainer([*argv, "--spike-rollback", "9"]).train()
    said = capsys.readouterr().err
    assert said.count("the run goes back to iteration 0") == 3
    assert said.count("iteration 2: the policy's divergence from the first is") == 3, "the very step is undone"


def test_there_is_no_loop_of_its_own() -> None:
    """A step of stage B is the trainer's: nothing here updates weights, goes backward, or runs blocks by itself."""
    folder = Path(__file__).parents[2] / "megaforge" / "reasoning"
    own = (".backward(", ".step(", "torch.optim", "zero_grad", "run_stage(", ".blocks", "optimizer.", "autograd.grad")
    files = list(folder.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        text = file.read_text("utf-8")
        assert [word for word in own if word in text] == [], file
