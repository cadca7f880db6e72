"""Texts from a model that is being trained, at the layout of its training: of each replica its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.errors import UserError
from megaforge.inference.fused_step import FusedStep
from megaforge.models.generation_state import GenerationState
from megaforge.models.hybrid import HybridModel
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.stages import ModelChunks, stage_executors
from megaforge.parallel.agree import reduced, tell_stages
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule
from megaforge.parallel.pipeline.executor import StageOutput
from megaforge.training.trainer import evaluating


class LiveModel:
    """The stages that this rank trains, as a :class:`megaforge.inference.generation.Scorer`. The ranks of tp and pp
    make the same calls, within :meth:`writing`; replicas (dp) write by themselves.

    Where replicas share experts, each call is one of all of them: who has nothing to write computes a token for nobody.

    Attributes:
        vocab_size: tokens that the model has scores for.
    """

    def __init__(self, model: HybridModel | ModelChunks, plan: PipelinePlan) -> None:
        """
        Raises:
            UserError: the model's sequences are shared by the ranks of cp.
        """
        self._model, self._chunks = model, model.chunks
        self.ctx, cfg = self._chunks[0].ctx, self._chunks[0].cfg
        if self.ctx.cp.size > 1:
            raise UserError(f"--cp {self.ctx.cp.size}: texts are written by ranks that have whole ones; use --cp 1")
        self.vocab_size = cfg.vocab_size or cfg.padded_vocab_size()
        self._region = self._chunks[0].region
        self._executor = stage_executors(model, replace(plan, schedule=_one_by_one(plan.schedule)))
        self._last_stage = plan.num_stages - 1
        self._last_rank = plan.schedule.rank_of(self._last_stage)
        self._step = FusedStep(self._chunks[0]) if plan.num_stages == 1 else None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it texts are written, and the model is in evaluation mode, as where it is at rest. It ends when those
        of all ranks that share experts do."""
        with self._region.whole(), evaluating(self._model), torch.no_grad():
            yield
            while self._in_step(False):
                self._scores(torch.zeros(1, 1, dtype=torch.long, device=self.ctx.device), self.new_state())

    def _in_step(self, calls: bool) -> bool:
        """Whether any rank with which this one shares experts has something to compute."""
        return calls if self.ctx.ep.size == 1 else bool(reduced(self.ctx, calls, dist.ReduceOp.MAX))

    def new_state(self, expected: int = 0) -> GenerationState:
        """An empty memory of all of this rank's blocks, with room for so many tokens."""
        layers = [layer for chunk in self._chunks for layer in chunk.new_state().layers]
        for layer in layers:
            if layer is not None:
                layer.expect(expected)
        return GenerationState(layers)

    def logits(self, tokens: Tensor, state: GenerationState) -> Tensor | None:
        """Scores after the last token: int64 [b, s] -> [b, vocabulary]; None on ranks without the last stage.

        Args:
            tokens: they continue those that ``state`` has seen, and it takes them in.
        """
        _ = self._in_step(True)
        if self._step is not None and self._step.takes(tokens, state):
            return self._step.logits(tokens, state)
        return self._scores(tokens, state)

    def _scores(self, tokens: Tensor, state: GenerationState) -> Tensor | None:
        own = dict(zip(map(id, self._chunks), self._parts(state), strict=True))

        def step(chunk: nn.Module, tokens: Tensor, received: Mapping[str, Tensor]) -> StageOutput:
            assert isinstance(chunk, HybridModel)
            scores, sent = chunk.stage_logits(tokens, state=own[id(chunk)], last_only=True, received=received)
            return StageOutput(sent, report=scores)

        told: dict[tuple[int, int], Any] = self._executor(1, tokens.shape).run([tokens], step, gradients=False)
        first = own[id(self._chunks[0])]
        state.length, state.unused_B = first.length, first.unused_B
        scores = told.get((0, self._last_stage))
        return None if scores is None else scores[:, -1]

    def _parts(self, state: GenerationState) -> Iterator[GenerationState]:
        """What each stage remembers."""
        begin = 0
        for chunk in self._chunks:
            end = begin + sum(len(block.sublayers) for block in chunk.blocks)
            yield replace(state, layers=state.layers[begin:end])
            begin = end

    def tell(self, drawn: Tensor) -> None:
        """What was drawn where the last stage is the other ranks of tp and pp get, in place."""
        tell_stages(self.ctx, drawn, self._last_rank)


def _one_by_one(schedule: Schedule) -> Schedule:
    """One micro-batch through the stages as ``schedule`` places them, which may not be defined for one."""
    actions = []
    for rank in range(schedule.num_ranks):
        stages = schedule.stages_of(rank)
        forward = [Action(ActionKind.FORWARD, stage, 0) for stage in stages]
        actions.append((*forward, *(Action(ActionKind.BACKWARD, stage, 0) for stage in reversed(stages))))
    return Schedule("one by one", schedule.num_ranks, schedule.num_chunks, 1, tuple(actions), schedule.placement)
