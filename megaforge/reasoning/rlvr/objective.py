"""``--objective rlvr``: the model writes answers to questions, and learns from what they are worth (reinforcement
learning from verifiable rewards; GRPO, arXiv 2402.03300, and what DAPO and Dr. GRPO made of it).

A step is the trainer's: what it learns from are prompts and answers as documents of packed sequences, and of each token
that was written what it was worth. Old log-probabilities and the reference's are those of a pass over these very
micro-batches, so that the ratio of the first update is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.rl_partners import has_reference
from megaforge.data.loader import Batch
from megaforge.errors import UserError
from megaforge.inference.live import LiveModel
from megaforge.inference.tool_calls import Tool, ToolCalls
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.parallel.agree import exchange, tell_stages, together
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.advantages import group_advantages, loss_weights, varied
from megaforge.reasoning.first_weights import FirstWeights
from megaforge.reasoning.packing import of_whole, samples_of
from megaforge.reasoning.policy_losses import clipped_surrogate, is_clipped, k3
from megaforge.reasoning.reference import without_adapters
from megaforge.reasoning.resampling import drawn, example_of
from megaforge.reasoning.rewards import Rewards
from megaforge.reasoning.rlvr.control import AnswerControl
from megaforge.reasoning.rlvr.conversation import Conversation, Sizes, converse
from megaforge.reasoning.rlvr.experience import Answer, Turn, as_batches, of_turns, with_worth
from megaforge.reasoning.rlvr.prompts import Prompt, Prompts
from megaforge.reasoning.rlvr.writing import Pen
from megaforge.registry import TOOLS
from megaforge.training.callbacks import callback_of
from megaforge.training.objectives import Objective

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class Spoken(NamedTuple):
    """What a sample's turns came to.

    Attributes:
        sample: its number.
        reward: of its answer.
        cut: whether its answer has no end.
    """

    sample: int
    turns: tuple[Turn, ...]
    reward: float
    cut: bool

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(sum(turn.own) for turn in self.turns)


class Writing(Objective):
    """See the module."""

    look_ahead = 1
    takes_loss_sum = False
    plays = True
    callbacks = ("answer_control", "first_weights")

    def __init__(self, config: Config) -> None:
        self._config, self._flags, self._how = config, config.rl, config.rollout
        self._length = config.data.seq_length
        self._rewards = Rewards(config.rewards)
        self._coefficient = config.rl.rl_kl
        self._has_reference = has_reference(config)
        self._prompts: Prompts | None = None
        self._sizes: Sizes | None = None
        self._tools: ToolCalls | None = None
        self._model: LiveModel | None = None
        self._told: tuple[str, ...] = ()

    def prepare(self, config: Config, model: nn.Module, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> None:
        self._prompts = Prompts(config)
        self._sizes = Sizes.of(config.rollout, self._prompts.tokenizer)
        if config.rollout.rl_tools:
            self._tools = ToolCalls([_tool(name) for name in config.rollout.rl_tools], self._prompts.tokenizer)

    def model(self, trainer: Trainer) -> LiveModel:
        """What writes for this run."""
        if self._model is None:
            self._model = LiveModel(trainer.engine.model, trainer.engine.plan)
        return self._model

    def experience(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        control = callback_of(trainer.callbacks, AnswerControl)
        answers, made = control.round_for(trainer, batches, partial(self._answered, trainer, batches))
        self._coefficient = control.coefficient
        if made is None:
            turns = [[turn for one in own for turn in one.turns] for own in answers]
            made = as_batches(turns, batches, self._length, trainer.ctx)
        self._told = tuple(answers[0][0].told)
        worth = (with_worth(batch, own) for batch, own in zip(made, answers, strict=True))
        return of_whole(worth, trainer.ctx)

    def _answered(self, trainer: Trainer, batches: Sequence[Batch]) -> tuple[dict[int, Answer], list[Batch]]:
        """The answers of a new round, of this rank, or of all where several steps learn from them; and the
        micro-batches of this rank's."""
        samples = [samples_of(batch) for batch in batches]
        whole = [sample for own in samples for sample in own]
        by_sample, tries = drawn(trainer.ctx, self._flags, whole, partial(self._drawn, trainer), attrgetter("reward"))
        said = [by_sample[sample] for sample in whole]
        turns = [[turn for sample in own for turn in by_sample[sample].turns] for own in samples]
        made = as_batches(turns, batches, self._length, trainer.ctx)
        old, reference = self._scored(trainer, made, turns)
        worth = self._judged(trainer.ctx, said)
        answers = {}
        for one in said:
            advantage, weight, alike = worth[one.sample]
            told = {"reward": one.reward, "answer_tokens": float(one.length), "cut_answers": float(one.cut)}
            told |= {"redrawn": float(tries[one.sample]), "equal_groups": float(alike)}
            own_old, own_reference = ([scores[turn] for turn in one.turns] for scores in (old, reference))
            answers[one.sample] = Answer(one.turns, own_old, own_reference, advantage, weight, told)
        if self._flags.rl_epochs > 1:
            answers = {sample: answer for own in exchange(trainer.ctx, answers) for sample, answer in own.items()}
        return answers, made

    def _drawn(self, trainer: Trainer, samples: Sequence[int], attempt: int) -> dict[int, Spoken]:
        return {one.sample: one for one in self.written(trainer, samples, attempt)}

    def written(self, trainer: Trainer, samples: Sequence[int], attempt: int = 0) -> list[Spoken]:
        """The model's answers, one a sample, and their rewards. Collective: every rank writes those of its samples.

        Args:
            attempt: how often the samples were drawn before.

        Raises:
            UserError: on every rank: a prompt leaves no room for an answer, or a reward is no number.
        """
        assert self._prompts is not None and self._sizes is not None
        of, size = self._prompts.of, self._flags.rl_group_size
        prompts = together(trainer.ctx, lambda: [self._fitting(of(example_of(k, size, attempt))) for k in samples])
        tokenizer, how = self._prompts.tokenizer, self._how
        talks = [Conversation(sample, one.asked, self._sizes) for sample, one in zip(samples, prompts, strict=True)]
        model = self.model(trainer)
        pen = Pen(model, tokenizer, how.rl_temperature, how.rl_rollout_batch_size, self._tools)
        with model.writing():
            found = converse(talks, pen, self._config.training.seed, trainer.iteration, attempt)
        texts = [pen.text(one) for one in found]
        rewards = together(
            trainer.ctx, lambda: [self._rewards(one.question, text) for one, text in zip(prompts, texts, strict=True)]
        )
        return [
            Spoken(talk.sample, tuple(talk.turns), reward, not written.ended)
            for talk, written, reward in zip(talks, found, rewards, strict=True)
        ]

    def _fitting(self, prompt: Prompt) -> Prompt:
        """It, where a row has room for what is written behind it."""
        assert self._sizes is not None
        question, asked = prompt
        if not asked.prompt:
            raise UserError(f"{question.place or 'the data'}: the prompt {question.prompt!r} has no tokens")
        most = self._sizes.longest(asked)
        if most > self._length:
            parts = "memory, chunk, question and memory anew" if asked.chunks else "a prompt and its answer"
            shorter = "--rl-chunk-tokens or --rl-memory-tokens" if asked.chunks else "prompts or --rl-max-new-tokens"
            raise UserError(
                f"--seq-length {self._length}: {parts} may have {most} tokens; give at least that, or shorter {shorter}"
            )
        return prompt

    def _scored(
        self, trainer: Trainer, made: Sequence[Batch], turns: Sequence[Sequence[Turn]]
    ) -> tuple[Mapping[Turn, list[float]], Mapping[Turn, list[float]]]:
        """Of each turn the log-probabilities of what was written, and the reference's: the former's where there is no
        reference. Collective."""
        engine, ctx = trainer.engine, trainer.ctx

        def seen() -> dict[Turn, list[float]]:
            told = engine.observe(made, lambda output, batch: self._log_probs(output).t())
            wide = torch.promote_types(engine.model.chunks[0].dtype, torch.float32)
            shape = (len(made), *made[0].tokens.shape)
            found = torch.stack(told).to(wide) if told else torch.empty(shape, dtype=wide, device=ctx.device)
            schedule = engine.plan.schedule
            tell_stages(ctx, found, schedule.rank_of(schedule.num_stages - 1))
            pairs = zip(found.cpu().double(), turns, strict=True)
            return {turn: values for one, own in pairs for turn, values in zip(own, of_turns(one, own), strict=True)}

        old = seen()
        if not self._has_reference:
            return old, old
        adapted = self._config.model.peft is not None
        first = callback_of(trainer.callbacks, FirstWeights)
        with without_adapters(engine.model) if adapted else first.in_place():
            return old, seen()

    def _judged(self, ctx: ParallelContext, said: Sequence[Spoken]) -> dict[int, tuple[float, float, bool]]:
        """Of each sample of the global batch the advantage and weight of every token, and whether its group's rewards
        are all alike; the same on every rank."""
        told = {sample: numbers for own in exchange(ctx, _numbers(said)) for sample, numbers in own.items()}
        samples, flags = sorted(told), self._flags
        rewards, lengths = torch.tensor([told[sample] for sample in samples], dtype=torch.float64).unbind(1)
        groups = rewards.view(-1, flags.rl_group_size)
        advantages = group_advantages(groups, scale=flags.rl_scale_advantages).flatten()
        weights = loss_weights(rewards, lengths, flags, self._how.rl_max_new_tokens)
        alike = (~varied(groups)).repeat_interleave(flags.rl_group_size)
        columns = (x.tolist() for x in (advantages, weights, alike))
        return dict(zip(samples, zip(*columns, strict=True), strict=True))

    def counts(self, batch: Batch) -> dict[str, float]:
        extras = batch.extras
        return {"episodes": float(extras["told"][:, -1].sum()), "decisions": float(extras["written"].sum())}

    def _log_probs(self, output: ModelOutput) -> Tensor:
        """Of each token's label [s, b], at the temperature at which answers are drawn."""
        temperature = self._how.rl_temperature
        if temperature == 1.0:
            return output.log_probs_SB
        assert output.head_input is not None and output.labels_BS is not None
        head, x = output.head_input
        return -head.loss(x / temperature, output.labels_BS).losses

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        flags, new = self._flags, self._log_probs(output)
        written, old, reference, advantage, weight = (
            batch.extras[name].t().to(new.device) for name in ("written", "old", "reference", "advantage", "weight")
        )
        # What was not written is as probable as ever: its terms are finite, and weigh nothing.
        old, reference = (torch.where(written, x.to(new.dtype), new.detach()) for x in (old, reference))
        advantage, weight = advantage.to(new.dtype), weight.to(new.dtype)
        clip = {"low": flags.rl_clip, "high": flags.clip_high}
        loss = clipped_surrogate(new, old, advantage, **clip, dual=flags.rl_dual_clip)
        found = {"loss": LossTerm((loss * weight).sum(), "episodes")}
        if self._has_reference:
            found["kl"] = LossTerm((k3(new, reference) * weight).sum(), "episodes", self._coefficient)
        ratio, clipped = (new - old).exp(), is_clipped(new, old, advantage, **clip)
        for name, x in {"policy_ratio": ratio, "clipped_decisions": clipped}.items():
            found[name] = LossTerm((x * written).sum().detach(), "decisions", 0.0)
        told = batch.extras["told"].sum(0).to(new.device)
        for number, name in enumerate(self._told):
            found[name] = LossTerm(told[number], "episodes", 0.0)
        return found


def _tool(name: str) -> Tool:
    tool: Tool = TOOLS.get(name)
    if hasattr(tool, "of"):
        raise UserError(f"--rl-tools {name}: it is made of a trained model and its memory; leave it out")
    return tool


def _numbers(said: Sequence[Spoken]) -> dict[int, tuple[float, float]]:
    return {one.sample: (one.reward, float(one.length)) for one in said}
