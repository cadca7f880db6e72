"""Learning from answers that the model writes: verl's loss, at every layout the same; and runs that are killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.config.rollout_config import RolloutConfig
from megaforge.errors import UserError
from megaforge.inference.desk import ask_at
from megaforge.monitor.names import known
from megaforge.reasoning.first_weights import FirstWeights
from megaforge.reasoning.resampling import equal_groups, example_of
from megaforge.reasoning.rlvr.control import AnswerControl
from megaforge.reasoning.rlvr.conversation import Asked, ReadingPrompt, Sizes
from megaforge.reasoning.rlvr.experience import Answer, Turn, as_batches
from megaforge.reasoning.rlvr.objective import Writing
from megaforge.reasoning.rlvr.prompts import Prompts
from megaforge.reasoning.rlvr.writing import Pen, seed_of
from megaforge.training.callbacks import callback_of
from megaforge.training.trainer import Trainer
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, train
from tests.reasoning.test_agent_parity import steps
from tests.training.tiny import goes_on_alike, make_trainer, record, weights
from tools import answer

LORA = ("--peft", "lora", "--lora-rank", "2", "--lora-dropout", "0")
LAYOUTS = {
    "dp4": ("--micro-batch-size", "4"),
    "tp2 x pp2": ("--tp", "2", "--pp", "2"),
    "tp2, sp, dp2, zero 2": ("--tp", "2", "--sp", "--zero", "2", "--micro-batch-size", "8"),
    "ep2 x tp2": ("--ep", "2", "--tp", "2"),
}


def rlvr_arguments(words: Path, *more: str) -> list[str]:
    """Flags of a model that writes in milliseconds; a reward that a model of random weights sometimes gets."""
    return [
        *("--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "48", "--rwkv-head-size", "8"),
        *("--data-path", "tasks://kv_chunks", "--tokenizer-model", str(words), "--seq-length", "48"),
        *("--device", "cpu", "--num-workers", "0", "--log-interval", "1", "--micro-batch-size", "8"),
        *("--global-batch-size", "16", "--train-iters", "2", "--lr", "1e-2", "--lr-decay-style", "constant"),
        *("--alerts-off", "throughput", "memory", "disk", "--hybrid-layer-pattern", "R-*-R*", "--fp64"),
        *("--objective", "rlvr", "--rl-group-size", "4", "--rl-task-chunks", "1", "--task-chunk-tokens", "9"),
        *("--task-window", "18", "--task-questions", "2"),
        *("--rl-max-new-tokens", "4", "--rl-reward", "exact", "format=0.5", "--rl-format", "^[kn]", *more),
    ]


def test_a_step_is_the_same_at_every_layout(ranks: RankPool, words: Path) -> None:
    """Others: dp4 and tp2 x pp2 below."""
    argv = rlvr_arguments(words, *LORA, "--rl-epochs", "2", "--rl-mean", "decision", "--rl-kl", "0.5")
    expected = train(argv)
    first, second = steps(expected)
    assert first["policy_ratio"] == 1 and second["policy_ratio"] != 1, "exactly, on the first update"
    assert first["kl"] > 1e-6 and 0 < first["reward"] == second["reward"] and first["grad_norm"] > 1e-3
    assert 1 <= first["answer_tokens"] <= 4 and 0 < first["cut_answers"] <= 1
    found = ranks.run(4, train, [*argv, *LAYOUTS["tp2, sp, dp2, zero 2"]])
    assert all(steps(one)[0]["policy_ratio"] == 1 for one in found)
    compare(found, expected, 1e-10)


def test_experts_and_all_weights(ranks: RankPool, words: Path) -> None:
    more = ("--rl-kl", "0", "--hybrid-layer-pattern", "RE*-R*", "--num-experts", "4", "--rl-temperature", "1.5")
    argv = rlvr_arguments(words, *more, "--no-rl-scale-advantages", "--rl-mean", "constant")
    expected = train(argv)
    assert [one["policy_ratio"] for one in steps(expected)] == [1, 1] and "kl" not in steps(expected)[0]
    compare(ranks.run(4, train, [*argv, *LAYOUTS["ep2 x tp2"]]), expected, 1e-10)


def rewarding(trainer: Trainer) -> Writing:
    assert isinstance(trainer.objective, Writing)
    return trainer.objective


def verl_loss(turns: list[tuple[Tensor, Tensor, Tensor, float]], mean: str, coefficient: float, longest: int) -> Tensor:
    """verl's ``compute_policy_loss_vanilla`` (clip 0.2 and 0.28, dual clip 3), ``kl_penalty`` low_var_kl and
    ``agg_loss`` by its modes (verl/trainer/ppo/core_algos.py), answer by answer.

    Args:
        turns: of each answer, log-probabilities new, old and by the reference, and the advantage.
    """
    matrices = []
    for new, old, reference, advantage in turns:
        ratio = torch.exp(new - old)
        first = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - 0.2, 1 + 0.28))
        lowered = torch.minimum(-advantage * torch.tensor(3.0, dtype=torch.float64), first)
        kl = reference - new
        low_var = torch.exp(kl) - kl - 1
        matrices.append((lowered if advantage < 0 else first) + coefficient * low_var)
    if mean == "decision":  # token-mean
        return torch.cat(matrices).mean()
    if mean == "episode":  # seq-mean-token-mean
        return torch.stack([one.mean() for one in matrices]).mean()
    return torch.stack([one.sum() for one in matrices]).sum() / longest / len(matrices)  # seq-mean-token-sum-norm


@pytest.mark.parametrize("mean", ["episode", "decision", "constant"])
def test_the_loss_is_verls(words: Path, mean: str) -> None:
    """In the second step of a round, where ratios are not 1; gradients too."""
    argv = rlvr_arguments(
        *(words, *LORA, "--rl-mean", mean, "--rl-kl", "0.3", "--rl-clip-high", "0.28", "--rl-epochs", "2"),
        *("--lr", "0.5", "--clip-grad", "0"),
    )
    trainer = make_trainer(argv)
    perturb(trainer.model, trainer.ctx, 0.3)
    [loader] = [iter(trainer._loader(trainer.data, trainer.progress.batches))]
    first = trainer.train_step(next(loader))
    batches = rewarding(trainer).experience(trainer, next(loader))
    found = trainer.gradients(batches)
    control = callback_of(trainer.callbacks, AnswerControl)
    answers = [control.kept[sample] for sample in sorted(control.kept)]
    assert len(answers) == 16 and first.extra["policy_ratio"] == 1

    rewards = torch.tensor([one.told["reward"] for one in answers], dtype=torch.float64).view(4, 4)
    spread = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    assert spread.abs().max() > 0.5
    torch.testing.assert_close(torch.tensor([one.advantage for one in answers]).double(), spread.flatten())

    turns = []
    for one, advantage in zip(answers, spread.flatten().tolist(), strict=True):
        [turn] = one.turns
        tokens = torch.tensor([turn.tokens])
        scores = trainer.model.logits(tokens[:, :-1])[0].log_softmax(-1)  # type: ignore[operator]
        new = scores.gather(-1, tokens[0, 1:, None])[-turn.written :, 0]
        old, reference = (torch.tensor(x[0], dtype=torch.float64) for x in (one.old, one.reference))
        turns.append((new, old, reference, advantage))
    assert max(float((new - old).detach().abs().max()) for new, old, _, _ in turns) > 0.3, "some ratios are clipped"
    expected = verl_loss(turns, mean, 0.3, 4)
    means = found.sums.means()
    assert means["loss"] + 0.3 * means["kl"] == pytest.approx(expected.item(), rel=1e-10)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient, rtol=1e-8, atol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("more", [("--rl-epochs", "3", "--rl-kl", "0", "--rl-resample", "1"), LORA])
def test_a_run_that_is_killed_goes_on_as_if_it_was_not(words: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    kl = ("--rl-kl-target", "0.01", "--rl-kl-limit", "1e-4") if more is LORA else ()
    argv = rlvr_arguments(words, "--train-iters", "4", *more, *kl)
    told = goes_on_alike(argv, tmp_path)
    assert all(known("step", name) for name in {*told[0]} - {"kind", "iteration"})


def test_where_all_weights_are_trained_the_reference_is_what_the_run_began_with(
    ranks: RankPool, words: Path, tmp_path: Path
) -> None:
    """At every layout, ended and gone on; its probabilities are those of a model that was never trained."""
    argv = rlvr_arguments(words, "--rl-kl", "0.5", "--train-iters", "3")
    told = [one for one in goes_on_alike(argv, tmp_path / "r") if one["kind"] == "step"]
    assert [one["policy_ratio"] for one in told] == [1, 1, 1] and told[0]["kl"] == 0
    assert told[1]["kl"] > 1e-6 and told[2]["kl"] > 1e-6
    expected = train(argv)
    compare(ranks.run(4, train, [*argv, *LAYOUTS["tp2, sp, dp2, zero 2"]]), expected, 1e-10)
    trainer, fresh = make_trainer(argv), make_trainer([*argv, "--rl-kl", "0"])
    trainer.train()
    answers = [one for _, one in sorted(callback_of(trainer.callbacks, AnswerControl).kept.items())]
    turns = [[turn for one in answers[first : first + 8] for turn in one.turns] for first in (0, 8)]
    read = next(iter(fresh._loader(fresh.data, fresh.progress.batches)))
    made = as_batches(turns, read, 48, fresh.ctx)
    assert isinstance(fresh.objective, Writing)
    first, _ = fresh.objective._scored(fresh, made, turns)
    assert [[first[turn] for turn in one.turns] for one in answers] == [one.reference for one in answers]
    assert any(one.reference != one.old for one in answers)


def test_a_reference_is_not_made_up_in_the_middle_of_a_run(words: Path, tmp_path: Path) -> None:
    argv = rlvr_arguments(words, "--save", str(tmp_path / "r"), "--load", str(tmp_path / "r"))
    make_trainer([*argv, "--rl-kl", "0", "--train-iters", "1"]).train()
    late = make_trainer([*argv, "--rl-kl", "0.1"])
    with pytest.raises(UserError, match=r"--rl-kl 0.1: the run has gone 1 steps without a reference"):
        late.train()
    begun = rlvr_arguments(
        words, "--pretrained-checkpoint", str(tmp_path / "r"), "--rl-kl", "0.1", "--train-iters", "1"
    )
    trainer = make_trainer(begun)
    was = weights(trainer)
    trainer.train()
    kept = callback_of(trainer.callbacks, FirstWeights).weights
    assert kept is not None
    for name, _, tensor in kept.entries():
        assert torch.equal(tensor, was[name]) and not name.startswith("callbacks"), name


RARE = ("--rl-kl", "0", "--rl-format", "^n1", "--rl-reward", "format", "--rl-drop-equal-groups")


def test_groups_that_are_all_alike_are_drawn_again(ranks: RankPool, words: Path) -> None:
    """Of other examples, the same ones at every layout; what is still alike behind that is told."""
    plain = train(rlvr_arguments(words, *RARE, "--train-iters", "1"))
    argv = rlvr_arguments(words, *RARE, "--train-iters", "1", "--rl-resample", "2")
    expected = train(argv)
    [before], [step] = steps(plain), steps(expected)
    assert before["redrawn"] == 0 and before["equal_groups"] > step["equal_groups"] and 0 < step["redrawn"] <= 2
    assert before["equal_groups"] - step["equal_groups"] <= before["redrawn"] + step["redrawn"]
    found = ranks.run(4, train, [*argv, *LAYOUTS["dp4"]])
    compare(found, expected, 1e-10)


def test_which_groups_are_alike() -> None:
    rewards = {7: 0.5, 4: 0.5, 6: 0.5, 5: 0.5, 0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}
    assert equal_groups(rewards, 4) == {1} and equal_groups(rewards, 1) == set(range(8)) and not equal_groups({}, 4)
    assert example_of(11, 4) == 2 and len({example_of(k, 4, attempt) for k in range(64) for attempt in range(9)}) == 144


def test_what_is_drawn_again_has_another_text_and_other_draws(words: Path) -> None:
    trainer = make_trainer(rlvr_arguments(words, "--rl-kl", "0"))
    perturb(trainer.model, trainer.ctx, 0.3)
    objective = rewarding(trainer)
    first, again = (objective.written(trainer, range(8), attempt) for attempt in (0, 1))
    prompts = [{one.turns[0].tokens[:11] for one in some} for some in (first, again)]
    assert len(prompts[0]) == len(prompts[1]) == 2 and not prompts[0] & prompts[1]


def test_answers_are_kept_as_they_were() -> None:
    turns = [Turn(7, 0, (1, 2, 3), (True,)), Turn(7, 1, (1, 5), (False,))]
    one = Answer(turns, [[-0.5], [-1.25]], [[-0.5], [-1 / 3]], 0.1, 1 / 7, {"reward": 1.0})
    assert Answer.of(json.loads(json.dumps(one.state()))) == one


def test_draws_are_of_seed_sample_and_step_alone(words: Path) -> None:
    """Whatever is written beside it, and however many texts at once; an end ends it."""
    trainer = make_trainer(rlvr_arguments(words, "--rl-kl", "0", "--rl-rollout-batch-size", "3"))
    perturb(trainer.model, trainer.ctx, 0.3)
    objective = rewarding(trainer)
    many = objective.written(trainer, range(16))
    assert len({one.turns[0].tokens for one in many}) > 8 and len({one.reward for one in many}) > 1
    assert objective.written(trainer, [9, 3]) == [many[9], many[3]]
    model, tokenizer = objective.model(trainer), Prompts(trainer.config).tokenizer
    with model.writing():
        [most] = Pen(model, tokenizer, 0.0, 8).write([many[0].turns[0].tokens[:11]], [0], 1)
    end = tokenizer.eod
    assert end is not None and all(end not in one.turns[0].tokens[-one.turns[0].written : -1] for one in many)
    assert not most.ended and len(most.tokens) == 1
    assert len({seed_of(1, 2, 3), seed_of(2, 2, 3), seed_of(1, 3, 2), seed_of(12, 3)}) == 4
    assert 0 <= seed_of(5) < 2**63


CHUNKS = ("--rl-chunk-tokens", "7", "--rl-memory-tokens", "3", "--rl-task-chunks", "2")


def test_a_long_text_is_read_chunk_by_chunk(words: Path) -> None:
    """Each prompt has the memory that was written behind the one before; one advantage is that of all turns."""
    trainer = make_trainer(rlvr_arguments(words, "--rl-kl", "0", *CHUNKS))
    perturb(trainer.model, trainer.ctx, 0.3)
    objective, prompts = rewarding(trainer), Prompts(trainer.config)
    for one in objective.written(trainer, [3, 5]):
        asked = prompts.of(one.sample // 4).asked
        assert [len(chunk) for chunk in asked.chunks] == [7, 7, 4] and len(one.turns) == 4
        memory: tuple[int, ...] = ()
        for turn, chunk in zip(one.turns, [*asked.chunks, ()], strict=True):
            prompt, written = turn.tokens[: -turn.written], turn.tokens[-turn.written :]
            assert prompt == (*memory, *chunk, *asked.prompt) and 1 <= turn.written <= (3 if chunk else 4)
            memory = written[:-1] if written[-1] == prompts.tokenizer.eod else written
        assert one.length == sum(turn.written for turn in one.turns) > 4
    [batch] = objective.experience(trainer, next(iter(trainer._loader(trainer.data, trainer.progress.batches))))[:1]
    control = callback_of(trainer.callbacks, AnswerControl)
    told = batch.extras["weight"][batch.extras["written"]]
    assert int(batch.extras["written"].sum()) == sum(control.kept[k].told["answer_tokens"] for k in range(8))
    lengths = torch.tensor([control.kept[k].told["answer_tokens"] for k in range(8)])
    assert told.sum().item() == pytest.approx(8) and (lengths > 4).all(), "a mean of tokens, then of samples"
    assert not batch.extras["advantage"][~batch.extras["written"]].any(), "prompts and chunks teach nothing"


def test_reading_is_the_same_at_every_layout(ranks: RankPool, words: Path) -> None:
    argv = rlvr_arguments(words, "--rl-kl", "0", *CHUNKS, "--rl-reading-prompt", "ask {question} n1 {memory} {chunk}")
    expected = train(argv)
    assert [one["policy_ratio"] for one in steps(expected)] == [1, 1] and steps(expected)[0]["grad_norm"] > 1e-3
    compare(ranks.run(4, train, [*argv, *LAYOUTS["tp2 x pp2"]]), expected, 1e-10)


def test_a_trained_model_answers(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``tools/answer.py`` writes what the model of the checkpoint finds most likely, whole or chunk by chunk."""
    argv = rlvr_arguments(words, "--rl-kl", "0", *CHUNKS, "--train-iters", "1", "--save", str(tmp_path / "r"))
    trainer = make_trainer(argv)
    trainer.train()
    text = tmp_path / "text.txt"
    text.write_text("k1 v2 n3 n4 k5 v6 n7 n8 k9 v10", encoding="utf-8")

    def answered(*flags: str) -> list[dict[str, Any]]:
        parsed = answer.parse_arguments(["--load", str(tmp_path / "r"), "--device", "cpu", "--json", *flags])
        capsys.readouterr()
        assert ask_at(answer.AnswerDesk, parsed) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    one, two = answered("--input", str(text), "--question", "ask k5", "--question", "ask k1")
    assert one["question"] == "ask k5" and len(one["memories"]) == 2 and two["memories"] != one["memories"]
    [whole] = answered("--input", str(text), "--question", "ask k5", "--chunk-tokens", "0", "--max-new-tokens", "1")
    tokenizer = Prompts(trainer.config).tokenizer
    scores = trainer.model.logits(torch.tensor([tokenizer.encode(text.read_text("utf-8") + " ask k5")]))  # type: ignore[operator]
    assert whole["memories"] == [] and whole["answer"] == tokenizer.decode(
        [int(scores[0, -1, : tokenizer.vocab_size].argmax())]
    )
    *each, told = answered("--task", "kv_chunks", "--chunks", "1", "--examples", "3", "--memory-tokens", "2")
    assert told == {"task": "kv_chunks", "chunks": 1, "examples": 3, "accuracy": sum(x["right"] for x in each) / 3}
    assert len(each) == 3 and all(len(memory.split()) <= 2 for x in each for memory in x["memories"])


def test_a_prompt_of_reading() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    prompt = ReadingPrompt("Q: {question} {memory}{chunk}\n", Letters())  # type: ignore[arg-type]
    assert prompt.own == 3 and prompt.filled(memory=(1, 2), chunk=(3,), question=(4,)) == (81, 58, 32, 4, 1, 2, 3)
    sizes = Sizes(5, 2, prompt)
    assert sizes.longest(Asked((1, 2))) == 7 and sizes.longest(Asked((1, 2), ((1,) * 4, (1,)))) == 3 + 2 + 2 + 4 + 2
    with pytest.raises(UserError, match="it must name {memory} once"):
        RolloutConfig(rl_reading_prompt="{chunk} {question}").validate()


OWN_TOOLS = """
from megaforge.registry import TOOLS

class Follows:
    opens = "n"

    def __init__(self, digit):
        self.closes = digit

    def __call__(self, request):
        return " v3 v4"

for digit in "12345":
    TOOLS.register("after" + digit, Follows(digit))
"""


def test_what_tools_answer_is_not_learnt(words: Path, tmp_path: Path) -> None:
    """It stands in the answer, and the model goes on behind it; but no loss, mean or count is of it."""
    own = tmp_path / "tools.py"
    own.write_text(OWN_TOOLS)
    tools = [f"after{digit}" for digit in "12345"]
    argv = rlvr_arguments(
        words, "--rl-kl", "0", "--rl-max-new-tokens", "9", "--extensions", str(own), "--rl-tools", *tools
    )
    trainer = make_trainer(argv)
    perturb(trainer.model, trainer.ctx, 0.3)
    batches = rewarding(trainer).experience(
        trainer, next(iter(trainer._loader(trainer.data, trainer.progress.batches)))
    )
    control = callback_of(trainer.callbacks, AnswerControl)
    answers, answered = list(control.kept.values()), Prompts(trainer.config).tokenizer.encode("v3 v4")
    with_tools = [one for one in answers if not all(one.turns[0].own)]
    assert 1 <= len(with_tools) and sum(sum(one.turns[0].own) for one in answers) < sum(
        one.turns[0].written for one in answers
    )
    for one in with_tools:
        [turn] = one.turns
        behind = [token for token, ours in zip(turn.tokens[-turn.written :], turn.own, strict=True) if not ours]
        assert behind[:2] == answered[: len(behind)] and one.told["answer_tokens"] == sum(turn.own)
    made = sum(int(batch.extras["written"].sum()) for batch in batches)
    assert made == sum(one.told["answer_tokens"] for one in answers)
    assert all(not batch.extras["weight"][~batch.extras["written"]].any() for batch in batches)
    with pytest.raises(UserError, match="--rl-tools retrieval: it is made of a trained model"):
        make_trainer(rlvr_arguments(words, "--rl-kl", "0", "--rl-tools", "retrieval"))
    with pytest.raises(UserError, match="--rl-tools calculater: .* did you mean calculator"):
        RolloutConfig(rl_tools=("calculater",)).validate()


def test_a_prompt_leaves_room_for_an_answer(words: Path) -> None:
    argv = rlvr_arguments(words, "--rl-kl", "0", "--rl-max-new-tokens", "40")
    with pytest.raises(UserError, match="--seq-length 48: a prompt and its answer may have 51 tokens"):
        make_trainer(argv).train()


def test_questions_of_a_file_are_answered(words: Path, tmp_path: Path) -> None:
    """And a reward of one's own, which sees the question."""
    file, own = tmp_path / "q.jsonl", tmp_path / "own.py"
    rows = [{"question": f"ask k{n}", "answer": f"v{n}"} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text(
        "from megaforge.registry import REWARDS\n"
        "REWARDS.register('ks', lambda question, written: written.count('k') + len(question.answer))\n"
    )
    argv = rlvr_arguments(words, "--rl-kl", "0")
    place, reward = argv.index("tasks://kv_chunks"), argv.index("exact")
    argv[place], argv[reward : reward + 2] = f"questions://{file}", ["ks"]
    for flag in ("--rl-task-chunks", "--rl-format"):
        start = argv.index(flag)
        del argv[start : start + 2]
    trainer = make_trainer([*argv, "--extensions", str(own)])
    told = record(trainer)
    trainer.train()
    first = told.records[0]
    assert 2 <= first["reward"] <= 6 and math.isfinite(first["loss"]) and first["grad_norm"] > 0
