"""The training loop and its one step. What is not the step is a callback (:mod:`megaforge.training.callbacks`)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.checkpoint.stateful import Stateful
from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.config import Config
from megaforge.data.data_source import DataSource, SampleView
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.device import synchronize
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.stages import ModelChunks, PipelinePlan
from megaforge.nn.moe import expert_counts
from megaforge.optim import AdamW, LearningRateSchedule, LossScaler, clip_gradients
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.requests import Requests
from megaforge.training.callbacks import Callback, in_order
from megaforge.training.checkpointing import compute_dtype, save_run
from megaforge.training.forward_backward import ForwardBackward, make_reducer
from megaforge.training.metrics import EvaluationMetrics, StepMetrics, balance_entropy_bits, greatest_expert_load


class Trainer:
    """Trains ``model`` on ``data``; every rank of the run has one and calls the same methods in the same order.

    Attributes:
        iteration: optimizer steps done, from the run's beginning.
        consumed_samples: samples trained on, from the run's beginning.
        earlier: ``samples`` and ``tokens`` trained on before ``--reset-data``; consumed_samples counts from there.
        started_over: what this run, going on from a checkpoint, did not take from it (``--no-load-optim`` ...).
        stateful: what checkpoints keep besides the run's own parts and callbacks, by name.
        saved_iteration: iteration of the newest checkpoint of this run, loaded or written; 0 if there is none.
        validation: what :meth:`evaluate` reads, or None without ``--eval-iters``.
        last_evaluation: the newest result of :meth:`evaluate`.
        tokens_per_expert: of the newest step's global batch, tokens that each expert of each MoE layer was chosen for.
        interrupted: whether the run ends because it was asked to (:class:`megaforge.resilience.requests.Requests`).
        save_due: whether the time asks for a checkpoint.
        stop_reason: why the run ends before ``--train-iters``, or None.
    """

    def __init__(
        self,
        config: Config,
        ctx: ParallelContext,
        model: HybridModel | ModelChunks,
        optimizer: AdamW,
        data: DataSource,
        *,
        plan: PipelinePlan,
        tokenizer: dict[str, Any] | None = None,
        batches: BatchSchedule,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """``model``: this rank's stages by ``plan``; ``tokenizer``: its identity as checkpoints keep it
        (:func:`megaforge.training.checkpointing.tokenizer_identity`)."""
        self.config, self.ctx, self.model, self.optimizer, self.data = config, ctx, model, optimizer, data
        self.tokenizer = tokenizer
        self.batches = batches
        self.callbacks = in_order(callbacks)
        self.reducer = make_reducer(config.parallel, model, ctx, optimizer.shards)
        self.pipeline = ForwardBackward(
            model,
            ctx,
            plan,
            self.reducer,
            dtype=compute_dtype(config.training),
            offload=config.parallel.cpu_offload_activations,
        )
        self.schedule = LearningRateSchedule(config.optimizer, config.training.train_iters)
        self.scaler = LossScaler(config.optimizer, enabled=config.training.fp16)
        self.validation = data.validation("valid") if config.training.eval_iters else None
        self.iteration = 0
        self.consumed_samples = 0
        self.stateful: dict[str, Stateful] = {}
        self.saved_iteration = 0
        self.earlier: Counter[str] = Counter()
        self.started_over: list[str] = []
        self.last_evaluation: EvaluationMetrics | None = None
        self.stop_reason: str | None = None
        self.tokens_per_expert: list[list[float]] = []
        self.interrupted = self.save_due = False
        self._requests = Requests()

    @property
    def finished(self) -> bool:
        """Whether no step follows: ``--train-iters`` is reached, or a callback stopped the run."""
        return self.iteration >= self.config.training.train_iters or self.stop_reason is not None

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on, from the run's beginning."""
        return self.data.tokens_before(self.consumed_samples) + self.earlier["tokens"]

    def add(self, callback: Callback) -> None:
        """Another callback, at its place."""
        self.callbacks = in_order([*self.callbacks, callback])

    def stop(self, reason: str) -> None:
        """Ends the run after this iteration's callbacks."""
        self.stop_reason = self.stop_reason or reason

    def train(self, requests: Requests | None = None) -> None:
        """Runs until :attr:`finished`, or until some rank's ``requests`` ask for the end."""
        if requests is not None:
            self._requests = requests
            self._heed(self._totals())  # what came while the run was set up ends it before its first step
        batch_schedule = dataclasses.replace(self.batches, before=self.earlier["samples"])
        loader = self._loader(self.data, batch_schedule, self.consumed_samples)
        self._emit("on_train_start")
        try:
            with closing(iter(loader)) as batches:  # type: ignore[type-var]
                while not self.finished:
                    self._emit("on_step_end", self._timed_step(batches))
            self.optimizer.wait_for_parameters()
        finally:
            self._emit("on_train_end")

    def train_step(self, micro_batches: Sequence[Batch]) -> StepMetrics:
        """One optimizer step over this rank's micro-batches of a global batch."""
        lr = self.schedule(self.iteration + 1)
        tokens = self._global_token_count(micro_batches)
        sequences = sum(len(batch.tokens) for batch in micro_batches) * self.ctx.dp.size
        length = micro_batches[0].tokens.shape[1]
        self.reducer.zero_grad()
        outputs = self.pipeline.forward_backward(
            micro_batches, lambda output: self._loss(output, tokens, sequences, length), self.scaler.scale
        )
        self.reducer.finish_grad_sync()
        self.pipeline.sum_tied_gradient()
        norms: dict[str, float] = {}
        clip = self.config.optimizer.clip_grad
        grad_norm = clip_gradients(self.model, self.ctx, clip, self.scaler.scale, norms)
        updated = self._update(grad_norm, lr)
        totals = self._totals(outputs)
        if updated:
            for stage in self.model.chunks:
                counts = expert_counts(stage, *totals.experts_of(stage))
                after_update(stage, Update(self.ctx, counts))
        self.tokens_per_expert = totals.tokens_per_expert
        self.iteration += 1
        self.consumed_samples += sequences
        self._heed(totals)
        metrics = self._metrics(totals, tokens, grad_norm, lr, sequences, length)
        metrics.extra.update({f"grad_norm/{kind}": norm for kind, norm in norms.items()})
        metrics.extra["clipped"] = float(0 < clip < grad_norm < math.inf)
        if self.scaler.enabled:
            metrics.extra.update(loss_scale=self.scaler.scale, skipped=float(not updated))
        return metrics

    def _totals(self, outputs: Iterable[tuple[HybridModel, ModelOutput]] = ()) -> _Totals:
        """The sums of ``outputs`` over all ranks, and with them what the ranks were asked for. Collective."""
        totals = _Totals(self.ctx)
        totals.add(outputs)
        totals.reduce(self._requests)
        return totals

    def _heed(self, totals: _Totals) -> None:
        """Does what any rank was asked for: all see the same sums, so they agree."""
        reason = self._requests.stop_reason(totals.votes)
        if reason is not None:
            self.interrupted = True
            self.stop(reason)
        self.save_due = self.save_due or self._requests.save_is_due(totals.votes)

    def _loss(self, output: ModelOutput, tokens: float, sequences: int, length: int) -> Tensor:
        """What a micro-batch's stage adds to the global batch's mean loss: every sum is divided by a global count."""
        cfg = self.config.model
        return (
            output.loss_sum / tokens
            + cfg.moe_aux_loss_coeff * output.load_balance_sum / sequences
            + cfg.moe_z_loss_coeff * output.z_loss_sum / (sequences * length)
        )

    def _update(self, grad_norm: float, lr: float) -> bool:
        """Steps the optimizer unless the gradient overflowed; all ranks see the same norm, so they agree."""
        finite = math.isfinite(grad_norm)
        if finite:
            self.optimizer.step(lr)
        elif not self.scaler.enabled or self.scaler.scale <= self.config.optimizer.min_loss_scale:
            raise UserError(
                f"iteration {self.iteration + 1}: the gradient norm is {grad_norm}, so the run ends before it can harm "
                f"the weights; --load the last checkpoint with a lower --lr than {self.config.optimizer.lr}, or start "
                "anew with a longer --lr-warmup-iters"
            )
        self.scaler.update(finite)
        return finite

    @torch.no_grad()
    def evaluate(self) -> EvaluationMetrics:
        """Measures the model, in evaluation mode, on the first ``--eval-iters`` global batches of the validation split.

        Raises:
            UserError: no label in them counts.
        """
        if self.validation is None:
            raise ValueError("this run has no validation data: --eval-iters is 0")
        totals = _Totals(self.ctx)
        loader = self._loader(self.validation, BatchSchedule(self.batches.size), 0)
        with evaluating(self.model), closing(iter(loader)) as batches:  # type: ignore[type-var]
            for micro_batches in islice(batches, self.config.training.eval_iters):
                # The ranks of pp and cp hold the same samples: one of them counts the labels.
                counts = self.ctx.pp.rank == self.ctx.cp.rank == 0
                totals.add(self.pipeline.forward(micro_batches), _token_count(micro_batches) if counts else 0.0)
        totals.reduce(self._requests)
        self._heed(totals)
        if not totals.tokens:
            raise UserError(
                f"--eval-iters {self.config.training.eval_iters}: there is nothing to predict in the validation "
                "samples it reads (with --eod-mask-loss, the first token of a document does not count)"
            )
        ratio = self.data.bytes_per_token("valid")
        metrics = EvaluationMetrics(
            iteration=self.iteration,
            nats=totals.loss_sum,
            tokens=round(totals.tokens),
            correct=round(totals.correct),
            text_bytes=None if ratio is None else totals.tokens * ratio,
        )
        self.last_evaluation = metrics
        self._emit("on_evaluate", metrics)
        return metrics

    def save(self) -> None:
        """Writes a checkpoint below ``--save``."""
        self.optimizer.wait_for_parameters()
        self._emit("on_checkpoint", save_run(self))
        self._requests.saved()
        self.save_due = False

    def _loader(self, data: SampleView, batches: BatchSchedule, consumed_samples: int) -> GlobalBatchLoader:
        return GlobalBatchLoader(
            data,
            batches,
            self.config.training.micro_batch_size,
            self.ctx.dp.rank,
            self.ctx.dp.size,
            consumed_samples,
            self.config.data.num_workers,
        )

    def _global_token_count(self, micro_batches: Sequence[Batch]) -> float:
        """Labels that count in the whole global batch; at least one, so that an all-masked batch gives zero loss.

        The ranks of cp and pp hold the same whole samples, so the sum over dp counts every label once.
        """
        count = torch.tensor(_token_count(micro_batches), dtype=torch.float64, device=self.ctx.device)
        if self.ctx.dp.group is not None:
            dist.all_reduce(count, group=self.ctx.dp.group)
        return max(count.item(), 1.0)

    def _metrics(
        self, totals: _Totals, tokens: float, grad_norm: float, lr: float, sequences: int, length: int
    ) -> StepMetrics:
        extra: dict[str, float] = {"global_batch_size": sequences} if self.batches.rampup else {}
        if totals.tokens_per_expert:
            extra["load_balance_loss"] = totals.load_balance_sum / sequences
            extra["z_loss"] = totals.z_loss_sum / (sequences * length)
            extra["expert_entropy_bits"] = balance_entropy_bits(totals.tokens_per_expert)
            extra["expert_max_load"] = greatest_expert_load(totals.tokens_per_expert)
        return StepMetrics(
            iteration=self.iteration,
            loss=totals.loss_sum / tokens,
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.consumed_tokens,
            consumed_samples=self.consumed_samples + self.earlier["samples"],
            step_tokens=sequences * length,
            extra=extra,
        )

    def _timed_step(self, batches: Any) -> StepMetrics:
        """The next global batch's step; its time includes the wait for the batch."""
        started = time.perf_counter()
        metrics = self.train_step(next(batches))
        synchronize(self.ctx.device)
        return metrics.after(time.perf_counter() - started)

    def _emit(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in evaluation mode; afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _token_count(micro_batches: Sequence[Batch]) -> float:
    """Labels that count in this rank's micro-batches."""
    return sum(float(batch.loss_mask.sum(dtype=torch.float64)) for batch in micro_batches)


class _Totals:
    """Sums of :class:`ModelOutput` over micro-batches and this rank's stages, then over dp, cp and pp; fp64, so that
    their order hardly matters. Every rank ends with the numbers of the whole model."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx
        self._sums = torch.zeros(5, dtype=torch.float64, device=ctx.device)
        self._experts: Tensor | None = None
        self.loss_sum = self.load_balance_sum = self.z_loss_sum = self.correct = self.tokens = 0.0
        self.tokens_per_expert: list[list[float]] = []
        self.votes: list[float] = []

    def add(self, outputs: Iterable[tuple[HybridModel, ModelOutput]], tokens: float = 0.0) -> None:
        """Takes in what stages put out for some micro-batches, which hold ``tokens`` counted labels."""
        self._sums[4] += tokens
        for stage, output in outputs:
            parts = (output.loss_sum, output.load_balance_sum, output.z_loss_sum, output.correct)
            self._sums[:4] += torch.stack([part.double() for part in parts])
            counts = torch.stack([output.tokens_per_expert, output.preferred_per_expert])
            if self._experts is None:
                self._experts = self._sums.new_zeros((2, stage.num_moe_layers, counts.shape[2]))
            self._experts[:, stage.moe_rows] += counts

    def reduce(self, requests: Requests) -> None:
        """Sums over dp, cp and pp, and what this rank was asked for over all ranks; brings the numbers to the host."""
        experts = self._sums.new_zeros((2, 0, 0)) if self._experts is None else self._experts
        own = requests.votes()
        packed = torch.cat([self._sums, self._sums.new_tensor(own), experts.flatten()])
        asked = packed[5 : 5 + len(own)]
        for axis in (self._ctx.dp_cp, self._ctx.pp):
            if axis.group is not None:
                dist.all_reduce(packed, group=axis.group)
        if self._ctx.tp.group is not None:  # its ranks have equal sums, but one alone may have been asked
            dist.all_reduce(asked, group=self._ctx.tp.group)
        values = packed[: 5 + len(own)].tolist()
        self.votes = values[5:]
        self.loss_sum, self.load_balance_sum, self.z_loss_sum, self.correct, self.tokens = values[:5]
        self._experts = packed[5 + len(own) :].view(experts.shape)
        self.tokens_per_expert = self._experts[0].tolist()

    def experts_of(self, stage: HybridModel) -> Tensor:
        """After :meth:`reduce`: the global batch's (tokens, choices by plain top-k) per expert of the stage's MoE
        layers, [2, layers, E]."""
        assert self._experts is not None
        return self._experts[:, stage.moe_rows]
