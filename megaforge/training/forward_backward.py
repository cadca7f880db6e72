"""Forward and backward of a global batch through this rank's stages of the model, whatever the pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.run_config import ParallelConfig
from megaforge.data.loader import Batch
from megaforge.device import upload
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.stages import ModelChunks, stage_executors, tied_weight
from megaforge.nn.compressed import CompressedActivations
from megaforge.nn.offload import HostMemory
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.dropout import DropoutRates
from megaforge.parallel.grad_compression import make_comm_hook
from megaforge.parallel.param_spec import main_grad_of
from megaforge.parallel.pipeline.executor import StageOutput
from megaforge.parallel.pipeline.tied import sum_tied_gradient
from megaforge.parallel.zero import ShardedParameters
from megaforge.training.multi_token import targets_ahead

# What a stage put out for a micro-batch -> its part of the loss (None: no part), and what the caller is told.
LossFn = Callable[[ModelOutput, Batch], tuple[Tensor | None, Any]]


def make_reducer(
    parallel: ParallelConfig,
    model: HybridModel | ModelChunks,
    ctx: ParallelContext,
    shards: ShardedParameters | None,
) -> GradientReducer:
    """The reduction of ``model``'s gradients that the flags ask for; ``shards``: the optimizer's."""
    return GradientReducer(
        model.chunks,
        ctx,
        bucket_size=parallel.ddp_bucket_size,
        overlap=parallel.overlap_grad_reduce,
        shards=shards,
        free_buffers=parallel.zero_stage == 2,
        reduction=make_comm_hook(parallel),
    )


def dropout_rates(config: Config) -> DropoutRates | None:
    """What ``--hidden-dropout`` and ``--attention-dropout`` ask for, and masks where an adapter asks for some; None:
    nothing."""
    model = config.model
    hidden, attention, adapters = model.hidden_dropout, model.attention_dropout, model.adapter_dropout
    return DropoutRates(hidden, attention, config.training.seed) if hidden or attention or adapters else None


class ForwardBackward:
    """Runs the stages; one stage (no pipeline) is the schedule that runs each micro-batch forward, then backward.

    Every rank of pp is given the same micro-batches, so only activations travel.
    """

    def __init__(
        self,
        model: HybridModel | ModelChunks,
        ctx: ParallelContext,
        plan: PipelinePlan,
        reducer: GradientReducer,
        *,
        offload: bool = False,
        compress: bool = False,
        dropout: DropoutRates | None = None,
    ) -> None:
        """``offload`` keeps what the backward pass needs in host memory (``--cpu-offload-activations``), ``compress``
        in 8 bits (``--compress-activations``); ``dropout`` is that of micro-batches that are trained on."""
        self.plan = plan
        self._model, self._ctx, self._dropout = model, ctx, dropout
        self._offload, self._compress = offload, compress
        self._tied = tied_weight(model, plan)
        self._executor = stage_executors(model, plan, lambda chunk, last: reducer.set_last_microbatch(last, chunk))
        self._inputs: dict[int, tuple[Any, ...]] = {}
        self._turns_back = False

    def run(
        self,
        micro_batches: Sequence[Batch],
        loss_fn: LossFn,
        *,
        gradients: bool = True,
        loss_scale: float = 1.0,
        of_sum: bool = False,
    ) -> Iterator[tuple[HybridModel, Any]]:
        """Every micro-batch through every stage of this rank; with ``gradients`` it accumulates the gradient of
        ``loss_scale`` times the sum of what ``loss_fn`` makes of them; ``of_sum``: the model's losses enter as
        :attr:`ModelOutput.loss_sum`, times a number.

        Raises:
            UserError: a micro-batch does not say what ``--hidden-dropout`` or ``--attention-dropout`` needs.

        Returns:
            Each stage and what ``loss_fn`` tells of a micro-batch; it must not keep an autograd graph alive.
        """
        self._inputs.clear()  # of a run that ended in an error
        executor = self._executor(len(micro_batches), micro_batches[0].tokens.shape)
        self._turns_back = of_sum and gradients and self.plan.schedule.turns_back
        step = partial(self._forward_step, loss_fn, self._dropout if gradients else None)
        reports = executor.run(micro_batches, step, gradients=gradients, loss_scale=loss_scale)
        chunks = self._model.chunks
        return ((chunks[self.plan.schedule.chunk_of(stage)], told) for (_, stage), told in reports.items())

    def sum_tied_gradient(self) -> None:
        """Gives both copies of a matrix on the first and the last stage the gradient of both; after the reduction."""
        if self._tied is not None and self._tied.requires_grad:
            sum_tied_gradient(main_grad_of(self._tied), self.plan.schedule, self._ctx.pp)

    def _forward_step(
        self,
        loss_fn: LossFn,
        dropout: DropoutRates | None,
        chunk: nn.Module,
        batch: Batch,
        payload: dict[str, Tensor],
    ) -> StageOutput:
        assert isinstance(chunk, HybridModel)
        inputs = self._inputs.pop(id(batch), None) or self._upload(chunk, batch, dropout)
        if chunk is not self._model.chunks[-1]:  # this rank's later stages read them too
            self._inputs[id(batch)] = inputs
        with self._saving():
            output, sent = chunk.run_stage(*inputs, received=payload, turns_back=self._turns_back)
            loss, told = loss_fn(output, batch)
        return StageOutput(sent, loss, told)

    def _upload(self, chunk: HybridModel, batch: Batch, dropout: DropoutRates | None) -> tuple[Any, ...]:
        """A micro-batch as stages take it. Document starts stay in host memory, where it is asked what there is."""
        device = self._ctx.device
        tokens, labels, mask = (upload(x, device) for x in (batch.tokens, batch.labels, batch.loss_mask))
        later = [(upload(one, device), upload(counts, device)) for one, counts in targets_ahead(batch, chunk.cfg)]
        info = chunk.pack(tokens, batch.document_start)
        info.used_BS = None if batch.used is None else upload(batch.used, device)
        if dropout is not None:
            if batch.samples is None:
                raise UserError(
                    "--hidden-dropout, --attention-dropout: a batch does not number its samples, which masks depend "
                    "on; give it samples, or write 0"
                )
            info.dropout = dropout.of(upload(batch.samples, self._ctx.device), info.positions_S)
        return tokens, labels, mask, info, later

    def _saving(self) -> AbstractContextManager[object]:
        if not torch.is_grad_enabled():
            return nullcontext()
        if self._compress:
            return CompressedActivations(self._model.parameters())
        return HostMemory(self._model.parameters()) if self._offload else nullcontext()
