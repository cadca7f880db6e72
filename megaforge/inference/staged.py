"""A model on the stages of a pipeline, forward only: scores to draw tokens by, and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.pattern import ahead_of
from megaforge.config.run_config import ParallelConfig
from megaforge.data.loader import Batch
from megaforge.device import record_graph, upload
from megaforge.errors import UserError
from megaforge.inference.fused_step import FusedStep
from megaforge.inference.recorded_steps import Record, RecordedSteps
from megaforge.models.ahead import Drafts, Ends
from megaforge.models.generation_state import GenerationState
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.stages import ModelChunks, plan_pipeline, stage_executors
from megaforge.parallel.pipeline.executor import StageOutput
from megaforge.registry import POSITION_EMBEDDINGS

_Tensors = Mapping[str, Tensor]
_Step = Callable[[_Tensors], tuple[Any, _Tensors]]


class StagedModel:
    """A model that is whole on each rank of pp, or cut into one stage a rank; the ranks of pp make the same calls.

    Attributes:
        vocab_size: tokens that the model has scores for.
        source: the first rank of the world that holds the last stage, and so gets the scores.
        model, plan: what it was made of.
    """

    def __init__(self, model: HybridModel | ModelChunks, plan: PipelinePlan | None = None) -> None:
        """``plan``: how the model was cut; None: it is whole."""
        [self._chunk] = model.chunks
        self.ctx, cfg = self._chunk.ctx, self._chunk.cfg
        self.model, self.plan = model, plan or plan_pipeline(cfg, ParallelConfig(), 1, 1)
        self._executor = stage_executors(model, self.plan)
        self.vocab_size = cfg.vocab_size or cfg.padded_vocab_size()
        self._step = FusedStep(self._chunk)
        pp, world = self.ctx.pp, self.ctx.world
        self.source = (pp.size - 1) * (world.size // pp.size)
        self._recorded: RecordedSteps | None = None

    @property
    def chunk(self) -> HybridModel:
        """This rank's stage."""
        return self._chunk

    def record_steps(self, record: Record = record_graph) -> None:
        """From now on the steps of one token of each text are recorded and played again
        (:mod:`megaforge.inference.recorded_steps`).

        Raises:
            UserError: ranks share the model, which is not recorded, or ``record`` is for GPUs and this is none.
        """
        if self.ctx.world.size > 1:
            raise UserError(f"--cuda-graph: {self.ctx.world.size} ranks share the model; it is for one")
        if record is record_graph and self.ctx.device.type != "cuda":
            raise UserError(f"--cuda-graph: there are none on --device {self.ctx.device.type}; leave it out")
        self._recorded = RecordedSteps(self._chunk, record)

    def new_state(self, expected: int = 0) -> GenerationState:
        """An empty memory of this rank's blocks, with room for so many tokens (0: it grows as they come)."""
        state = self._chunk.new_state()
        for layer in state.layers:
            if layer is not None:
                layer.expect(expected)
        return state

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: GenerationState) -> Tensor | None:
        """Scores after the last token: int64 [b, s] -> [b, vocabulary]; None on ranks without the last stage.

        Args:
            tokens: they continue those that ``state`` has seen, and it takes them in.
        """
        if self._recorded is not None:
            played = self._recorded.logits(tokens, state)
            if played is not None:
                return played
            self._recorded.release(state)
        if self._step.takes(tokens, state):
            return self._step.logits(tokens, state)

        def score(received: _Tensors) -> tuple[Tensor | None, _Tensors]:
            return self._chunk.stage_logits(tokens, state=state, last_only=True, received=received)

        [scores] = self._run([score], tokens.shape)
        return None if scores is None else scores[:, -1]

    def tell(self, drawn: Tensor) -> None:
        """What was drawn by :attr:`source` all ranks get, in place."""
        if self.ctx.world.size > 1:
            dist.broadcast(drawn, src=self.source, group=self.ctx.world.group)

    @torch.no_grad()
    def ends(self, tokens: Tensor, state: GenerationState) -> Ends | None:
        """What the head and further predictions are given of tokens int64 [b, s]; the rest is as :meth:`logits`."""

        def see(received: _Tensors) -> tuple[Ends | None, _Tensors]:
            return self._chunk.stage_ends(tokens, state=state, received=received)

        found: Ends | None = self._run([see], tokens.shape)[0]
        return found

    def drafts(self) -> Drafts | None:
        """What further predictions propose for a text, from its beginning; None on ranks without the last stage.

        Raises:
            UserError: the model predicts the next token alone.
        """
        if not ahead_of(self._chunk.cfg):
            raise UserError(
                "--speculate mtp: this model predicts the next token alone; train one with --mtp-num-layers, or leave "
                "the flag out"
            )
        modules = self._chunk.mtp if self._chunk.is_last else None
        return None if modules is None else modules.drafts(self._chunk.pack)

    @property
    def predictions(self) -> int:
        """How many tokens it predicts beyond the next one."""
        return len(ahead_of(self._chunk.cfg))

    @property
    def longest(self) -> int | None:
        """How many tokens a text may have; None: any number."""
        cfg = self._chunk.cfg
        most: int | None = POSITION_EMBEDDINGS.get(cfg.position_embedding_type).longest(cfg)
        return most

    @torch.no_grad()
    def sums(self, batches: Sequence[Batch]) -> Tensor:
        """fp64 [2]: sums over tokens of loss mask * cross-entropy in nats, and of loss mask * (the label scored
        highest); 0 on ranks without the last stage.

        Args:
            batches: of one shape [b, s]; several keep the stages busy at the same time.
        """
        return torch.stack(self._measure(batches, lambda output: [output.loss_sum, output.correct], ())).sum(0)

    @torch.no_grad()
    def sequence_sums(self, batches: Sequence[Batch]) -> Tensor:
        """:meth:`sums` of each sequence by itself: fp64 [b, 2] of each batch, one after the other."""

        def by_sequence(output: ModelOutput) -> list[Tensor]:
            losses, correct = output.losses_SB.double(), output.correct_SB.double()
            return [(values * output.mask_SB.double()).sum(0) for values in (losses, correct)]

        found = self._measure(batches, by_sequence, batches[0].tokens.shape[:1])
        return torch.cat([sums.t() for sums in found])

    def _measure(
        self, batches: Sequence[Batch], sums: Callable[[ModelOutput], list[Tensor]], shape: Sequence[int]
    ) -> list[Tensor]:
        """Two ``sums`` of each batch, fp64 [2, *shape]; 0 on ranks without the last stage."""

        def measure(batch: Batch, received: _Tensors) -> tuple[Tensor, _Tensors]:
            tokens, labels, mask = (upload(x, self.ctx.device) for x in (batch.tokens, batch.labels, batch.loss_mask))
            info = self._chunk.pack(tokens, batch.document_start)
            output, sent = self._chunk.run_stage(tokens, labels, mask, info, received=received)
            found = [torch.zeros(tuple(shape))] * 2 if output.scored is None else sums(output)
            return torch.stack(found).to(self.ctx.device, torch.float64), sent

        return self._run([partial(measure, batch) for batch in batches], batches[0].tokens.shape)

    @torch.no_grad()
    def observe(self, batches: Sequence[Batch], look: Callable[[ModelOutput, Batch], Any]) -> list[Any]:
        """What ``look`` says of each batch of one shape, in order, where the last stage is; elsewhere nothing.
        Collective."""

        def see(batch: Batch, received: _Tensors) -> tuple[Any, _Tensors]:
            tokens, labels, mask = (upload(x, self.ctx.device) for x in (batch.tokens, batch.labels, batch.loss_mask))
            info = self._chunk.pack(tokens, batch.document_start)
            output, sent = self._chunk.run_stage(tokens, labels, mask, info, received=received)
            return None if output.scored is None else look(output, batch), sent

        told = self._run([partial(see, batch) for batch in batches], batches[0].tokens.shape)
        return [one for one in told if one is not None]

    @torch.no_grad()
    def expert_counts(self, batches: Sequence[Batch]) -> Tensor:
        """:attr:`megaforge.models.hybrid.ModelOutput.experts` of this rank's stage, summed over batches of one shape;
        layers of further predictions count nothing."""

        def count(batch: Batch, received: _Tensors) -> tuple[Tensor, _Tensors]:
            tokens, labels, mask = (upload(x, self.ctx.device) for x in (batch.tokens, batch.labels, batch.loss_mask))
            info = self._chunk.pack(tokens, batch.document_start)
            output, sent = self._chunk.run_stage(tokens, labels, mask, info, received=received)
            return output.experts, sent

        steps = [partial(count, batch) for batch in batches]
        return torch.stack(self._run(steps, batches[0].tokens.shape)).sum(0)

    def _run(self, steps: Sequence[_Step], shape: torch.Size) -> list[Any]:
        """What each step, of one micro-batch of ``shape`` [b, s], finds out on this rank's stage."""
        reports = self._executor(len(steps), shape).run(steps, _step, gradients=False)
        return [reports.get((number, self.ctx.pp.rank)) for number in range(len(steps))]


def _step(chunk: nn.Module, step: _Step, received: dict[str, Tensor]) -> StageOutput:
    report, sent = step(received)
    return StageOutput(sent, report=report)
