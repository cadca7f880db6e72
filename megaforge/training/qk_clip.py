"""``--qk-clip``: queries and keys of attention heads whose logits grow too large are scaled down after the update
(QK-clip of Kimi K2, arXiv 2507.20534; with grouped queries by key head, as in Megatron-LM)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim.main_parameters import MainParameter
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class HasLogits(Protocol):
    """A layer with attention logits.

    Attributes:
        watches_logits: whether it takes down the largest of them as it trains.
        largest_logits: of each head of this rank since it was last None: [heads], fp32 (fp64 for fp64).
    """

    watches_logits: bool
    largest_logits: Tensor | None

    def logit_factors(self, limit: float, alpha: float) -> dict[nn.Parameter, Tensor]:
        """What takes heads beyond ``limit`` back to it: factors of the rows of this rank's parameters, by parameter;
        queries get the power ``alpha`` of limit / largest logit, and keys the rest."""


class QKClip(Callback):
    """The largest logit of a head is that over the global batch's forward passes, before the update; heads are scaled
    in the masters, on the ranks that hold them, before the weights travel."""

    place = Place.BEFORE

    def __init__(self, config: OptimizerConfig) -> None:
        self.limit, self.alpha = config.qk_clip_threshold, config.qk_clip_alpha
        self._layers: list[HasLogits] = []
        self._highest = torch.tensor(-math.inf)
        self._factors: dict[int, Tensor] | None = None

    @classmethod
    def of(cls, config: Config) -> QKClip | None:
        """What the flags ask for."""
        flags = config.optimizer
        return cls(flags) if flags.qk_clip else None

    def on_train_start(self, trainer: Trainer) -> None:
        having = (module for module in trainer.model.modules() if hasattr(type(module), "logit_factors"))
        self._layers = [cast(HasLogits, module) for module in having]
        for layer in self._layers:
            layer.watches_logits = True
        trainer.optimizer.correct = self._correct

    def on_train_end(self, trainer: Trainer) -> None:
        for layer in self._layers:
            layer.watches_logits = False
        trainer.optimizer.correct = None

    def on_step_start(self, trainer: Trainer) -> None:
        for layer in self._layers:
            layer.largest_logits = None

    def on_gradients(self, trainer: Trainer) -> None:
        ctx, self._factors = trainer.ctx, None
        found = [layer.largest_logits for layer in self._layers if layer.largest_logits is not None]
        highest = torch.full((1,), -math.inf, dtype=torch.float64, device=ctx.device)
        if found:
            together = torch.cat(found)
            if ctx.dp_cp.group is not None:
                dist.all_reduce(together, dist.ReduceOp.MAX, group=ctx.dp_cp.group)
            for layer, part in zip(self._layers, together.split([len(one) for one in found]), strict=True):
                layer.largest_logits = part
            highest = torch.maximum(highest, together.amax().double())
        for axis in (ctx.tp, ctx.pp):
            if axis.group is not None:
                dist.all_reduce(highest, dist.ReduceOp.MAX, group=axis.group)
        # It is there when the host has waited for the gradient's norm, before anybody reads it.
        self._highest = highest.to("cpu", non_blocking=True)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if math.isfinite(highest := float(self._highest)):
            metrics.extra["max_attention_logit"] = highest
            metrics.extra["qk_clipped"] = float(highest > self.limit)

    def _correct(self, main: MainParameter) -> None:
        if not float(self._highest) > self.limit:
            return
        if self._factors is None:
            factors = (layer.logit_factors(self.limit, self.alpha) for layer in self._layers)
            self._factors = {id(parameter): rows for one in factors for parameter, rows in one.items()}
        rows = self._factors.get(id(main.parameter))
        if rows is not None:
            main.scale_rows(rows)
