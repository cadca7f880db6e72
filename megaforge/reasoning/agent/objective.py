"""``--objective agent``: a memory agent plays episodes of a task, and learns from them by reinforcement.

A step is the trainer's: what it learns from are the contexts in which the agent decided, as documents of packed
sequences, and of each decision what it was worth. Old log-probabilities, the reference's and values are those of a pass
over these very micro-batches, so that the ratio of the first update is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.data.loader import Batch
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.parallel.agree import exchange, together
from megaforge.parallel.context import ParallelContext
from megaforge.reasoning.agent.algorithms import Algorithm, Played, judge
from megaforge.reasoning.agent.answers import AnswerWorth
from megaforge.reasoning.agent.control import AgentControl
from megaforge.reasoning.agent.episode import Decision, Episode, Setting
from megaforge.reasoning.agent.experience import TOLD, Record, as_batches, with_worth
from megaforge.reasoning.agent.heads import AgentHeads
from megaforge.reasoning.agent.player import play, sampled
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.agent.run_memory import RunMemory
from megaforge.reasoning.agent.scoring import decisions, scored
from megaforge.reasoning.agent.texts import TaskTexts
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.episodic import EpisodicIndex
from megaforge.reasoning.packing import of_whole, samples_of
from megaforge.reasoning.policy_losses import clipped_surrogate, entropy, is_clipped, k3, value_loss
from megaforge.reasoning.resampling import drawn, example_of
from megaforge.reasoning.texts_beside import TextsBeside
from megaforge.registry import RL_ALGORITHMS
from megaforge.training.callbacks import callback_of
from megaforge.training.objectives import Objective

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class AgentObjective(Objective):
    """See the module."""

    look_ahead = 1
    takes_loss_sum = False
    plays = True
    callbacks = ("policy_control", "run_memory")

    def __init__(self, config: Config) -> None:
        self._config, self._flags = config, config.rl
        self._beside = TextsBeside(config)
        self._algorithm: Algorithm = RL_ALGORITHMS.get(config.rl.rl_algorithm)(config.rl)
        self._setting = Setting.of(config.rl)
        self._reader: Reader | None = None
        self._texts: TaskTexts | None = None
        self._worth: AnswerWorth | None = None
        self._coefficient, self._length = config.rl.rl_kl, config.data.seq_length

    def prepare(self, config: Config, model: nn.Module, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> None:
        self._texts = TaskTexts(config)
        self._worth = AnswerWorth(config, self._texts.tokenizer)
        together(ctx, self._beside.open)

    def new_memory(self, dtype: torch.dtype, beneath: EpisodicIndex | None = None) -> AgentMemory:
        """An empty one, that also finds what is ``beneath``."""
        return AgentMemory(MemoryShape.of(self._config), dtype, beneath)

    def reader(self, trainer: Trainer) -> Reader:
        """What reads contexts for this run."""
        if self._reader is None:
            config = trainer.config
            rows = config.training.micro_batch_size
            self._reader = Reader(trainer.engine, config.model, config.data.seq_length, rows)
        return self._reader

    def experience(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        control, reader = callback_of(trainer.callbacks, AgentControl), self.reader(trainer)
        records, made = control.round_for(trainer, batches, partial(self._played, trainer, reader, batches))
        self._coefficient = control.coefficient
        if made is None:
            made = self._batches(trainer, [[one.decisions for one in own] for own in records], batches)
        return [with_worth(batch, own) for batch, own in zip(made, records, strict=True)]

    def _batches(
        self, trainer: Trainer, decisions: Sequence[Sequence[Sequence[Decision]]], read: Sequence[Batch]
    ) -> list[Batch]:
        """What is learnt from: the contexts of these decisions, and texts beside them."""
        made = as_batches(decisions, read, self._length, trainer.ctx)
        made = self._beside.beside(made, [samples_of(batch) for batch in read])
        return of_whole(made, trainer.ctx)

    def _played(
        self, trainer: Trainer, reader: Reader, batches: Sequence[Batch]
    ) -> tuple[dict[int, Record], list[Batch]]:
        """The episodes of a new round, of this rank, or of all where several steps learn from them; and the
        micro-batches of this rank's decisions."""
        if trainer.iteration == 0 and reader.own is not None:
            reader.own.keep_reference()
        reader.share_heads()
        samples, flags = [samples_of(batch) for batch in batches], self._flags
        by_sample, tries = drawn(
            *(trainer.ctx, flags, [k for own in samples for k in own]),
            draw=partial(self._play, trainer, reader),
            worth=lambda one: one.worth - flags.rl_action_cost * one.cost,
        )
        groups = [[by_sample[k] for k in own] for own in samples]
        episodes = [one for own in groups for one in own]
        made = self._batches(trainer, [[one.decisions for one in own] for own in groups], batches)
        scores = scored(reader, made)
        actions = self._setting.actions
        played = [
            Played(
                *(one.sample, bool(one.verdict), tuple(int(not actions[d.action].free) for d in one.decisions)),
                *(found[2], one.worth),
            )
            for one, found in zip(episodes, scores, strict=True)
        ]
        told = exchange(trainer.ctx, played)
        judged = judge(list({one.sample: one for own in told for one in own}.values()), self._flags, self._algorithm)
        _run_memory(trainer).take(trainer.ctx, episodes, judged)
        records = {}
        for one, (old, reference, value) in zip(episodes, scores, strict=True):
            worth = judged[one.sample]
            numbers = {"old": old, "reference": reference, "value": value, "advantage": worth.advantages}
            numbers |= {"returns": worth.returns, "weight": (worth.weight,) * len(old)}
            whole = {
                "reward": worth.reward,
                "accuracy": float(bool(one.verdict)),
                "actions": float(one.cost),
                "decisions_made": float(len(one.decisions)),
                "memory_summaries": float(one.memory.summaries),
                "memory_entries": float(one.memory.entries),
                "redrawn": float(tries[one.sample]),
                "equal_groups": float(worth.alike),
            }
            records[one.sample] = Record(one.decisions, numbers, whole)
        if self._flags.rl_epochs > 1:
            records = {sample: record for own in exchange(trainer.ctx, records) for sample, record in own.items()}
        return records, made

    def _play(self, trainer: Trainer, reader: Reader, samples: Sequence[int], attempt: int) -> dict[int, Episode]:
        """Episodes, to their end, and what they are worth. Collective."""
        texts, beneath = self._texts, _run_memory(trainer).index
        assert texts is not None and self._worth is not None
        dtype, size = reader.heads.policy.weight.dtype, self._flags.rl_group_size

        def begun(sample: int) -> Episode:
            text = texts.of(example_of(sample, size, attempt))
            return Episode(sample, text, self.new_memory(dtype, beneath), self._setting)

        episodes = [begun(sample) for sample in samples]
        play(episodes, reader, sampled, self._config.training.seed, trainer.iteration, attempt)
        self._worth.give(episodes, reader)
        return {one.sample: one for one in episodes}

    def counts(self, batch: Batch) -> dict[str, float]:
        extras = batch.extras
        made, ends, chunk = (float(x.sum()) for x in (extras["place"] > 0, extras["ends"], extras["chunk"]))
        own = {"decisions": made, "episodes": ends, "chunk_tokens": chunk}
        return own | self._beside.counts(batch)

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        assert self._reader is not None and self._reader.own is not None
        heads, flags = self._reader.own, self._flags
        opinion, action, here = decisions(heads, output, batch)
        device, dtype = here.device, opinion.value.dtype
        extras = {name: x.to(device) for name, x in batch.extras.items()}
        old, reference, value, advantage, returns, weight = (
            extras[name].to(dtype) for name in ("old", "reference", "value", "advantage", "returns", "weight")
        )
        new = opinion.log_probs.gather(-1, action[..., None]).squeeze(-1)
        clip = {"low": flags.rl_clip, "high": flags.clip_high}

        def summed(x: Tensor, by: Tensor | None = None) -> Tensor:
            return ((x if by is None else x * by).masked_fill(~here, 0)).sum()

        terms = {
            "loss": (clipped_surrogate(new, old, advantage, **clip, dual=flags.rl_dual_clip), weight, 1.0),
            "kl": (k3(new, reference), weight, self._coefficient),
            "entropy": (entropy(opinion.log_probs), weight, -flags.rl_entropy),
            "value_loss": (
                value_loss(opinion.value, value, returns, flags.rl_value_clip),
                weight,
                flags.rl_value_weight if self._algorithm.learns_value else 0.0,
            ),
        }
        found = {name: LossTerm(summed(x, by), "episodes", factor) for name, (x, by, factor) in terms.items()}
        ratio, clipped = (new - old).exp(), is_clipped(new, old, advantage, **clip).to(dtype)
        for name, x in {"policy_ratio": ratio, "clipped_decisions": clipped}.items():
            found[name] = LossTerm(summed(x).detach(), "decisions", 0.0)
        ends = here & extras["ends"]
        for number, name in enumerate(TOLD):
            found[name] = LossTerm((extras["told"][..., number] * ends).sum(), "episodes", 0.0)
        found["memory_loss"] = self._memory_loss(heads, output, batch)
        return found | self._beside.terms(output)

    def _memory_loss(self, heads: AgentHeads, output: ModelOutput, batch: Batch) -> LossTerm:
        assert output.head_input is not None and output.info is not None
        head, x = output.head_input
        chunk = output.info.local(batch.extras["chunk"]).t().to(x.device)
        loss = heads.summariser.loss(x, output.info, head.region, chunk)
        return LossTerm(loss, "chunk_tokens", self._flags.memory_loss_weight)


def _run_memory(trainer: Trainer) -> RunMemory:
    return callback_of(trainer.callbacks, RunMemory)
