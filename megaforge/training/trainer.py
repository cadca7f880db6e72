"""The training loop and its one step. What is not the step is a callback (:mod:`megaforge.training.callbacks`)."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megaforge.checkpoint.background import BackgroundSave
from megaforge.checkpoint.encryption import Key
from megaforge.checkpoint.replica import Replica
from megaforge.checkpoint.stateful import Stateful
from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.data_source import DataSource, SampleView
from megaforge.data.dealing import Dealing
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.data.patience import Patience
from megaforge.data.skipped import SkippedSamples
from megaforge.errors import UserError
from megaforge.monitor.audit import AuditTrail
from megaforge.monitor.events import EventLog
from megaforge.optim import GradientLimits, LearningRateSchedule
from megaforge.resilience.requests import Requests
from megaforge.resilience.snapshots import SnapshotStore
from megaforge.training.batch_sums import BatchSums
from megaforge.training.callbacks import Callback, in_order
from megaforge.training.checkpointing import save_run, start_save
from megaforge.training.engine import Engine
from megaforge.training.lengths import Progress
from megaforge.training.metrics import EvaluationMetrics, StepMetrics
from megaforge.training.micro_batches import MicroBatches
from megaforge.training.multi_token import as_read
from megaforge.training.objectives import Predictions, make_objective
from megaforge.training.recovery import Gradients, LeavingOut
from megaforge.training.repeating import Repeating
from megaforge.training.run_events import of_checkpoint

if TYPE_CHECKING:
    from megaforge.training.builder import TrainerBuilder
    from megaforge.training.spike_rollback import SpikeRollback


class Trainer:
    """Trains a model on ``data``; every rank of the run has one and calls the same methods in the same order.

    Attributes:
        engine: the model and all that a step does to it; ``ctx``, ``model``, ``optimizer`` and ``scaler`` are its.
        objective: what is minimised.
        data: what it trains on; see :class:`megaforge.data.skipped.SkippedSamples`.
        leaving_out: what is done about a gradient that is not finite.
        micro_batches: what is done about a step that memory does not suffice for.
        patience: what is done about samples that cannot be read.
        repeating: what computes suspect gradients again (``--repeat-suspect-steps``), or None.
        lr_factors: what callbacks multiply the scheduled learning rate by, by name; checkpoints keep them.
        iteration: optimizer steps done, from the run's beginning.
        consumed_samples: samples trained on, from the run's beginning.
        tokens_before_step: :attr:`consumed_tokens` before the newest step.
        last_batch: samples of the newest step.
        rollback: what takes the run back after a spike (``--spike-rollback``), or None.
        earlier: ``samples`` and ``tokens`` trained on before ``--reset-data``; consumed_samples counts from there.
        started_over: what this run, going on from a checkpoint, did not take from it (``--no-load-optim`` ...).
        stateful: what checkpoints keep besides the run's own parts and callbacks, by name.
        saved_iteration: iteration of the newest checkpoint of this run, loaded or written; 0 if there is none.
        validation: what :meth:`evaluate` reads, or None without ``--eval-iters``.
        for_evaluation: what :meth:`evaluate` runs the model within, on all ranks: other weights, say.
        last_evaluation: the newest result of :meth:`evaluate`.
        tokens_per_expert: of the newest step's global batch, tokens that each expert of each MoE layer was chosen for:
            [MoE layers, E], on the device.
        interrupted: whether the run ends because it was asked to (:class:`megaforge.resilience.requests.Requests`).
        paused: whether it ends to be continued (``--exit-interval``).
        save_due: whether the time asks for a checkpoint.
        background: what writes checkpoints while steps go on (``--async-save``), or None.
        key: what encrypts checkpoints, or None.
        replica: where copies of checkpoints go, or None.
        snapshots: where snapshots in memory are (``--snapshot-interval``), or None.
        save_written: whether it has written one on all ranks, which :meth:`settle_save` makes known.
        stop_reason: why the run ends before ``--train-iters``, or None.
        events: where what happens to the run is told.
        dealing: how many micro-batches each dp rank takes of a global batch; None: all as many.
        taken: micro-batches of the newest step on this rank.
        audit: where it is put on record (``--audit-trail``), on the first rank, or None.
        tell_phase: is told what the run does from now on; each call is a sign that it goes on.
        now: the host's clock that steps are timed by, in seconds.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: DataSource,
        *,
        tokenizer: dict[str, Any] | None = None,
        batches: BatchSchedule,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """``tokenizer``: its identity as checkpoints keep it
        (:func:`megaforge.training.checkpointing.tokenizer_identity`)."""
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.data = data if isinstance(data, SkippedSamples) else SkippedSamples(data)
        self.ctx, self.model = engine.ctx, engine.model
        self.optimizer, self.scaler = engine.optimizer, engine.scaler
        self.objective, self._predictions = make_objective(config), Predictions(config)
        self.lr_factors: dict[str, float] = {}
        self.batches = batches
        self.callbacks = in_order(callbacks)
        self.validation = data.validation("valid") if config.training.eval_iters else None
        self.iteration = 0
        self.consumed_samples = 0
        self.tokens_before_step = self.last_batch = 0
        self.stateful = {"lr_factors": Stateful(lambda: dict(self.lr_factors), self._load_lr_factors)}
        self.saved_iteration = 0
        self.earlier: Counter[str] = Counter()
        self.micro_batches = MicroBatches(config, self.ctx)
        self.patience = Patience(config.resilience.data_retries, self._tell_retry)
        flags = config.resilience
        self.repeating = Repeating(flags.spike_window) if flags.repeat_suspect_steps else None
        self.leaving_out = LeavingOut(config.resilience.skip_nonfinite_steps)
        if self.leaving_out.most:
            self.stateful["left_out"] = Stateful(self.leaving_out.state, self.leaving_out.load_state)
        self.schedule = LearningRateSchedule(
            config.optimizer, config.training.train_iters, config.length, self.progress
        )
        self.started_over: list[str] = []
        self.for_evaluation: Callable[[], AbstractContextManager[None]] = nullcontext
        self.last_evaluation: EvaluationMetrics | None = None
        self.stop_reason: str | None = None
        self.tokens_per_expert = torch.empty((0, 0))
        self.interrupted = self.save_due = self.paused = self.save_written = False
        self.background: BackgroundSave | None = None
        self.key: Key | None = None
        self.rollback: SpikeRollback | None = None
        self.replica: Replica | None = None
        self.snapshots: SnapshotStore | None = None
        self.events = EventLog()
        self.dealing: Dealing | None = None
        self.taken = 0
        self.audit: AuditTrail | None = None
        self.tell_phase: Callable[[str], None] = lambda phase: None
        self.now: Callable[[], float] = time.perf_counter
        self._by_background: Path | None = None
        self._requests = Requests()

    @staticmethod
    def builder() -> TrainerBuilder:
        """Puts a run together step by step, from Python."""
        from megaforge.training.builder import TrainerBuilder

        return TrainerBuilder()

    @property
    def finished(self) -> bool:
        """Whether no step follows: ``--train-iters`` is reached, or a callback stopped the run."""
        return self.iteration >= self.config.training.train_iters or self.stop_reason is not None

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on, from the run's beginning."""
        return self.data.tokens_before(self.consumed_samples) + self.earlier["tokens"]

    @property
    def progress(self) -> Progress:
        """What has been read so far, and what each next step reads."""
        samples, tokens = self.earlier["samples"], self.earlier["tokens"]
        batches = dataclasses.replace(self.batches, before=samples)
        return Progress(self.data, batches, self.iteration, self.consumed_samples, samples, tokens)

    def add(self, callback: Callback) -> None:
        """Another callback, at its place."""
        self.callbacks = in_order([*self.callbacks, callback])

    @property
    def complete(self) -> bool:
        """Whether it is finished for good: neither asked to end nor paused."""
        return self.finished and not self.interrupted and not self.paused

    def stop(self, reason: str) -> None:
        """Ends the run after this iteration's callbacks."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self.events.tell("stop", reason=reason)

    def _load_lr_factors(self, saved: dict[str, float]) -> None:
        self.lr_factors = dict(saved)
        for name, factor in saved.items():
            print_rank_0(f"the learning rate goes on multiplied by {factor:g} ({name})")

    def train(self, requests: Requests | None = None) -> None:
        """Runs until :attr:`finished`, or until some rank's ``requests`` ask for the end."""
        if requests is not None:
            self._requests = requests
            self.micro_batches.follow()
            self._read(BatchSums(self.ctx, self.objective))  # what came while the run was set up ends it here
        self._emit("on_train_start")
        try:
            while not self.finished:  # anew, where the run has gone back
                self._train_on()
            self.optimizer.wait_for_parameters()
        finally:
            self._emit("on_train_end")

    def _train_on(self) -> None:
        """Steps on the samples from here on, until :attr:`finished` or :attr:`rollback` takes the run back."""
        loader = self._loader(self.data, self.progress.batches, self.consumed_samples, self.objective.look_ahead)
        loader.dealing = self.dealing
        with closing(iter(loader)) as batches:
            while not self.finished:
                metrics = self._timed_step(batches)
                self._emit("on_numbers", metrics)
                if self.rollback is not None and self.rollback.goes_back(self, metrics):
                    return
                self._emit("on_step_end", metrics)

    def went_back(self) -> None:
        """Tells callbacks that the run stands behind an earlier iteration again."""
        self.saved_iteration = min(self.saved_iteration, self.iteration)
        if self.last_evaluation is not None and self.last_evaluation.iteration > self.iteration:
            self.last_evaluation = None
        self._emit("on_rollback")

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """One optimizer step over this rank's micro-batches of a global batch."""
        self._emit("on_step_start")
        lr = self.schedule(self.iteration + 1) * math.prod(self.lr_factors.values())
        sums, grad_norm, extra = found = self.gradients(getattr(self.objective, "experience", as_read)(self, batches))
        self.leaving_out.judge(self, found)
        updated = self.engine.update(lr, grad_norm, sums)
        if updated:
            self._emit("on_update")
        self.iteration += 1
        self.tokens_before_step = self.consumed_tokens
        self.last_batch = round(float(sums.counts["sequences"]))
        self.consumed_samples += self.last_batch
        self.tokens_per_expert = sums.experts[0]
        self._heed(sums)
        if self.batches.changes:
            extra["global_batch_size"] = float(sums.counts["sequences"])
        if self.scaler.enabled:
            extra["loss_scale"] = self.scaler.scale
        if self.scaler.enabled or self.leaving_out.most:
            extra["skipped"] = float(not updated)
        return self._metrics(sums, grad_norm, lr, extra)

    def gradients(self, batches: Sequence[Batch]) -> Gradients:
        """The gradient of these micro-batches, summed over the ranks and clipped, and their numbers. Where memory did
        not suffice on some rank, all make it again in smaller pieces."""
        if self.repeating is not None:
            self.repeating.begin(self)
        found = self._attempt(batches)
        while found.sums.lost:
            self.micro_batches.halve(self)
            found = self._again(batches)
        return found if self.repeating is None else self.repeating.judge(self, found, partial(self._again, batches))

    def _again(self, batches: Sequence[Batch]) -> Gradients:
        self._emit("on_step_start")
        return self._attempt(batches)

    def _attempt(self, batches: Sequence[Batch]) -> Gradients:
        self.taken = len(batches)
        self.engine.zero_grad()
        sums = self.micro_batches.forward_backward(self.engine, batches, self.objective)
        self._emit("on_backward")
        self.engine.reduce_gradients()
        self._emit("on_gradients")
        sums.votes = self._votes()
        norm, extra = self.engine.clip(GradientLimits.of(self.config.optimizer), sums)
        return Gradients(sums, norm, extra)

    def _metrics(self, sums: BatchSums, grad_norm: float, lr: float, extra: dict[str, float]) -> StepMetrics:
        means = sums.means()
        return StepMetrics(
            iteration=self.iteration,
            loss=means.pop("loss"),
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.consumed_tokens,
            consumed_samples=self.consumed_samples + self.earlier["samples"],
            step_tokens=round(float(sums.counts["tokens"])),
            extra=means | sums.balance | extra,
        )

    def _read(self, sums: BatchSums) -> None:
        """Makes ``sums`` global and brings them to the host, outside of a step. Collective."""
        sums.votes = self._votes()
        self.engine.reduce(sums)
        sums.read()
        self._heed(sums)

    def _heed(self, sums: BatchSums) -> None:
        """Does what any rank was asked for: all see the same votes, so they agree."""
        *votes, writing = sums.votes
        reason = self._requests.stop_reason(votes)
        if reason is not None:
            self.interrupted = True
            self.stop(reason)
        self.save_due = self.save_due or self._requests.save_is_due(votes)
        self.save_written = self.background is not None and self.background.in_flight and not writing

    def _votes(self) -> list[float]:
        """What this rank was asked for, and whether it is still writing a checkpoint."""
        return [*self._requests.votes(), float(self.background is not None and self.background.writing)]

    def evaluate(self, due: bool = True) -> EvaluationMetrics:
        """:meth:`measure`, told to callbacks."""
        with self.events.timed("evaluate") as told:
            metrics = self.last_evaluation = self.measure(due)
            told.update(metrics.values())
        self._emit("on_evaluate", metrics)
        return metrics

    def measure(self, due: bool = True) -> EvaluationMetrics:
        """Measures the model on the first ``--eval-iters`` global batches of the validation split. Collective.

        Args:
            due: whether it is one of ``--eval-interval`` (:class:`megaforge.training.metrics.EvaluationMetrics`).
        """
        if self.validation is None:
            raise ValueError("this run has no validation data: --eval-iters is 0")
        return self._measure(self.validation, "valid", due)

    def test(self, view: SampleView) -> EvaluationMetrics:
        """Measures the model on ``view``, the test samples, which nothing that the run does depends on."""
        with self.events.timed("test") as told:
            metrics = self._measure(view, "test", False)
            told.update(metrics.values())
        self._emit("on_test", metrics)
        return metrics

    def _measure(self, view: SampleView, part: str, due: bool) -> EvaluationMetrics:
        """The model, in evaluation mode, on the first ``--eval-iters`` global batches of ``view``.

        Raises:
            UserError: no label in them counts.
        """
        sums = self.predictions(view, self.config.training.eval_iters)
        if not sums.values["labels"]:
            raise UserError(
                f"--eval-iters {self.config.training.eval_iters}: there is nothing to predict in the {part} "
                "samples it reads (with --eod-mask-loss, the first token of a document does not count)"
            )
        ratio, own = self.data.bytes_per_token(part), Predictions.OWN
        return EvaluationMetrics(
            iteration=self.iteration,
            nats=sums.values["loss"],
            tokens=round(sums.values["labels"]),
            correct=round(sums.values["correct"]),
            text_bytes=None if ratio is None else sums.values["labels"] * ratio,
            due=due,
            extra={
                name.removeprefix(own): value / sums.values["labels"]
                for name, value in sums.values.items()
                if name.startswith(own)
            },
        )

    def predictions(self, view: SampleView, most: int | None = None) -> BatchSums:
        """Sums of :class:`megaforge.training.objectives.Predictions`, of the model in evaluation mode, over the global
        batches of ``view``, at most so many. Collective."""
        sums = BatchSums(self.ctx, self._predictions)
        size = self.config.training.eval_global_batch_size or self.batches.size
        loader = self._loader(view, BatchSchedule(size))
        with self.for_evaluation(), evaluating(self.model), closing(iter(loader)) as batches:
            for micro_batches in islice(batches, most):
                self.tell_phase(f"evaluation after step {self.iteration}")
                self.engine.forward(micro_batches, sums)
        self._read(sums)
        return sums

    def save(self) -> None:
        """Writes a checkpoint below ``--save``; with ``--async-save``, where steps follow, begins to. One that is being
        written is waited for."""
        self.tell_phase(f"save after step {self.iteration}")
        self.optimizer.wait_for_parameters()
        self.settle_save()
        if self.background is None or self.finished:
            with self.events.timed("save") as told:
                path, self._by_background = save_run(self), None
                told.update(step=self.saved_iteration, **of_checkpoint(self, path))
                self._emit("on_checkpoint", path)
        else:
            with self.events.timed("save_begin") as told:
                told["step"] = self.iteration
                start_save(self, self.background)
        self._requests.saved()
        self.save_due = False

    def settle_save(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, and tells callbacks of it. Collective.

        Raises:
            UserError: on every rank, when any could not write it.
        """
        if self.background is not None and self.background.in_flight:
            self.save_written = False
            with self.events.timed("save") as told:
                path, self.saved_iteration = self.background.wait()
                self._by_background = path
                told.update(step=self.saved_iteration, **of_checkpoint(self, path))
                self._emit("on_checkpoint", path)

    def in_background(self, path: Path) -> bool:
        """Whether :attr:`background` has written the checkpoint ``path``."""
        return self._by_background == path

    def _loader(
        self, data: SampleView, batches: BatchSchedule, consumed_samples: int = 0, look_ahead: int = 1
    ) -> GlobalBatchLoader:
        loader = GlobalBatchLoader(
            data,
            batches,
            self.config.training.micro_batch_size,
            self.ctx.dp.rank,
            self.ctx.dp.size,
            consumed_samples,
            self.config.data.num_workers,
            look_ahead,
        )
        loader.fill = self.patience.fill(data.fill)
        return loader

    def _tell_retry(self, *, what: str, error: str, attempt: int) -> None:
        self.events.tell("retry", what=what, error=error, attempt=attempt, rank=self.ctx.world.rank)
        text = f"rank {self.ctx.world.rank}: {what} could not be read ({error}); attempt {attempt}"
        print(text, file=sys.stderr, flush=True)

    def _timed_step(self, batches: Any) -> StepMetrics:
        """The next global batch's step; its time includes the wait for the batch.

        On a GPU the host runs ahead by the optimizer's update: a step's time is that from one reading of the batch's
        numbers to the next.
        """
        started = self.now()
        metrics = self.train_step(next(batches))
        return metrics.after(self.now() - started)

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
