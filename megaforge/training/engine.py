"""One optimizer step in parts, at any layout: what a training loop of any kind stands on.

::

    engine.zero_grad()
    sums = engine.forward_backward(batches, objective)
    engine.reduce_gradients()
    norm, _ = engine.clip(1.0, sums)
    engine.update(lr, norm, sums)
    print(sums.means())

Every rank calls the same methods in the same order, each with its own micro-batches; the ranks of tp, cp and pp with
the same. :meth:`Engine.clip` is the only place where the host waits for the device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megaforge.config.config import Config
from megaforge.data.loader import Batch
from megaforge.device import upload
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.stages import ModelChunks
from megaforge.nn.losses import LossTerm, total_loss
from megaforge.nn.moe import expert_counts
from megaforge.optim import GradientLimits, LossScaler, Optimizer, clip_gradients
from megaforge.optim.gradient_filter import make_filter
from megaforge.optim.penalty import add_penalty
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.training.batch_sums import BatchSums
from megaforge.training.forward_backward import ForwardBackward, dropout_rates, make_reducer
from megaforge.training.objectives import Objective


class Engine:
    """This rank's stages of a model, the reduction of their gradients, their optimizer and the loss scale.

    Attributes:
        plan: how the model is cut into stages, and their schedule.
        filter: what changes reduced gradients before they are clipped (``--grokfast``), or None.
    """

    def __init__(
        self,
        config: Config,
        ctx: ParallelContext,
        model: HybridModel | ModelChunks,
        optimizer: Optimizer,
        plan: PipelinePlan,
    ) -> None:
        """``model``: this rank's stages by ``plan``, initialised."""
        self.ctx, self.model, self.optimizer, self.plan = ctx, model, optimizer, plan
        self.reducer = make_reducer(config.parallel, model, ctx, optimizer.shards)
        self.filter = make_filter(config.optimizer, optimizer.main.trained)
        self._penalty = config.regularization
        self.scaler = LossScaler(config.optimizer, enabled=config.training.fp16)
        offload = config.parallel.cpu_offload_activations
        dropout = dropout_rates(config)
        compress = config.parallel.compress_activations
        self._pipeline = ForwardBackward(
            model, ctx, plan, self.reducer, offload=offload, compress=compress, dropout=dropout
        )
        self._each_layer = config.logging.moe_per_layer_logging
        self._terms = WeakIdKeyDictionary()  # of each objective that is alive: its terms and their counts
        self._kept: dict[int, _Kept] = {}  # those of which Python cannot tell that they are gone (with slots)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self.reducer.zero_grad()

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> BatchSums:
        """Adds the gradient of the loss, the weighted mean of every term over the global batch, times the loss scale.

        Args:
            batches: this rank's micro-batches of the global batch.

        Returns:
            The terms' sums over this rank's micro-batches and stages.
        """
        sums = BatchSums(self.ctx, objective, self._global_counts(batches, objective), self._each_layer)
        of_sum = getattr(objective, "takes_loss_sum", False)
        for told in self._pipeline.run(batches, partial(_loss, sums), loss_scale=self.scaler.scale, of_sum=of_sum):
            sums.add(*told)
        return sums

    def lost(self, objective: Objective) -> BatchSums:
        """Sums of a rank that could not do its part of the step: in them all ranks learn of it."""
        sums = BatchSums(self.ctx, objective, each_layer=self._each_layer)
        first = self.model.chunks[0]
        sums.lost, sums.experts = True, sums.experts.new_zeros((3, first.num_moe_layers, first.most_experts))
        sums.layers = first.experts
        return sums

    def forward(self, batches: Sequence[Batch], sums: BatchSums) -> None:
        """Adds the terms of these micro-batches by the objective of ``sums``; computes no gradient."""
        for told in self._pipeline.run(batches, partial(_terms, sums), gradients=False):
            sums.add(*told)

    def observe(self, batches: Sequence[Batch], look: Callable[[ModelOutput, Batch], Any]) -> list[Any]:
        """What ``look`` says of each micro-batch, in order, where the last stage is; elsewhere nothing. There is no
        gradient, and nothing is dropped. Collective over tp, cp, pp and ep."""

        def last(output: ModelOutput, batch: Batch) -> tuple[None, Any]:
            return None, None if output.scored is None else look(output, batch)

        return [told for _, told in self._pipeline.run(batches, last, gradients=False)]

    def reduce_gradients(self) -> None:
        """Sums the gradients over replicas, and those of a matrix that two stages have."""
        self.reducer.finish_grad_sync()
        self._pipeline.sum_tied_gradient()

    def reduce(self, sums: BatchSums) -> None:
        """Sums over all ranks. Collective."""
        key: Objective | _Kept = sums.objective
        try:
            weakref.ref(key)
        except TypeError:  # a class with slots
            key = self._kept.setdefault(id(key), _Kept(sums.objective))
        if not self._terms.get(key):  # a rank knows those of its own stages: at first, all tell each other
            found = exchange(self.ctx, sums.found)
            self._terms[key] = {name: count for one in found for name, count in one.items()}
        sums.reduce(self._terms[key])

    def clip(self, limits: GradientLimits | float, sums: BatchSums) -> tuple[float, dict[str, float]]:
        """Adds penalties (``--l2-coeff``), takes the loss scale off the gradients, filters them (``--grokfast``), and
        brings them within ``limits`` (a number: of the global norm; 0 is none); makes ``sums`` global and reads them.

        Returns:
            The norm before clipping, inf or nan where the gradients overflowed or the filter does not bear them
            (:meth:`megaforge.optim.gradient_filter.GradientFilter.bears`); and what else there is to record
            (:func:`megaforge.optim.clip.clip_gradients`).

        Raises:
            UserError: on every rank: the objective's terms have no place.
        """
        self.reduce(sums)
        add_penalty(self._penalty, self.optimizer.main.trained, self.scaler.scale)
        scale, metrics = self.scaler.scale, dict[str, float]()
        if self.filter is None:
            return clip_gradients(self.model, self.ctx, limits, scale, metrics, sums.read), metrics
        unfiltered = clip_gradients(self.model, self.ctx, 0.0, scale, metrics, sums.read)
        enters = self.filter.bears(unfiltered) and not sums.lost
        if enters:
            self.filter.apply()
        scale = 1.0 if math.isfinite(unfiltered) else scale
        norm = clip_gradients(self.model, self.ctx, limits, scale, metrics)
        if not enters and math.isfinite(norm):
            norm = math.inf
        return norm, metrics | {"unfiltered_grad_norm": unfiltered}

    def update(self, lr: float, grad_norm: float, sums: BatchSums) -> bool:
        """Steps the optimizer unless the gradient overflowed, and lets modules take in what the batch told of them.
        All ranks see the same norm, so they agree.

        Returns:
            Whether the weights were updated.
        """
        finite = math.isfinite(grad_norm)
        if finite:
            self.optimizer.step(lr)
            for stage in self.model.chunks:
                counts = expert_counts(stage, *sums.experts[:2, stage.moe_rows])
                after_update(stage, Update(self.ctx, counts))
        else:
            self.reducer.forget_losses()
        self.scaler.update(finite)
        return finite

    def _global_counts(self, batches: Sequence[Batch], objective: Objective) -> dict[str, Tensor | float]:
        """What terms are divided by, of the whole global batch: at least one, so that an all-masked batch gives zero
        loss. The ranks of cp and pp hold the same whole samples, so the sum over dp counts everything once.

        Raises:
            UserError: the objective has a count of its own by the name of one that there is anyway.
        """
        own: dict[str, float] = {}
        for batch in batches:
            for name, count in objective.counts(batch).items():
                own[name] = own.get(name, 0.0) + count
        if taken := own.keys() & {"sequences", "tokens"}:
            raise UserError(
                f"the objective {type(objective).__name__} has a count {min(taken)!r}, as every batch has already; "
                "give it another name"
            )
        counted = upload(torch.tensor(list(own.values()), dtype=torch.float64), self.ctx.device)
        if self.ctx.dp.group is not None:
            dist.all_reduce(counted, group=self.ctx.dp.group)
        known = batches[0].of
        sequences = float(sum(len(batch.tokens) for batch in batches) * self.ctx.dp.size if known is None else known)
        of = batches[0].tokens_of
        tokens = sequences * batches[0].tokens.shape[1] if of is None else float(of)
        counts: dict[str, Tensor | float] = {"sequences": sequences, "tokens": tokens}
        return counts | dict(zip(own, counted.clamp(min=1.0).unbind(), strict=True))


class _Kept:
    """An objective that cannot be referred to weakly."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective


_Told = tuple[dict[str, LossTerm], Tensor]


def _objective_terms(objective: Objective, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
    own = objective.terms(output, batch)
    twice = own.keys() & output.terms.keys()
    if twice:
        raise UserError(f"the objective's loss term {min(twice)!r} has the name of one that a layer makes; rename it")
    if "loss" not in own:
        raise UserError(f"the objective {type(objective).__name__} gives no loss term called 'loss'")
    return own


def _terms(sums: BatchSums, output: ModelOutput, batch: Batch) -> tuple[None, _Told]:
    """The terms of a micro-batch on one stage, and its counts of experts. What is wrong with them only the ranks of the
    last stage see: they go on until all can be told, or the others would wait for them."""
    own: dict[str, LossTerm] = {}
    if output.scored is not None:
        try:
            own = _objective_terms(sums.objective, output, batch)
        except UserError as error:
            sums.faults.append(str(error))
    if sums.each_layer:  # reported only: the sum over layers is trained
        for name, terms in output.layer_terms.items():
            own |= {f"{term}/{name}": replace(one, weight=0.0, layers=1) for term, one in terms.items()}
    return None, (own | output.terms, output.experts)


def _loss(sums: BatchSums, output: ModelOutput, batch: Batch) -> tuple[Tensor | None, _Told]:
    """What a stage adds to the loss that is differentiated."""
    _, (terms, experts) = _terms(sums, output, batch)
    detached = {name: replace(term, sum=term.sum.detach()) for name, term in terms.items()}
    try:
        return total_loss(terms, sums.counts), (detached, experts)
    except UserError as error:
        sums.faults.append(str(error))
        return None, (detached, experts)
