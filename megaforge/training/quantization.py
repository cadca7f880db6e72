"""How quantization comes in while a model trains: its share of the product, its stages, what is told of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.qat_config import QuantStage
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.agree import exchange
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.quant.quantizers import ActivationScheme
from megaforge.quant.statistics import QuantizedSize, WeightStatistics, quantized_layers, quantized_size
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer


class Quantization(Callback):
    """Of models with quantized matrices. Everything is a function of the step, so that a resumed run needs no state."""

    place = Place.BEFORE

    def __init__(self, config: Config) -> None:
        self.config, self.flags, self.stages = config, config.qat, config.qat.stages
        self._log_interval = config.logging.log_interval if config.qat.log_quantization else 0
        self._statistics = WeightStatistics()
        self._stage: QuantStage | None = None

    @classmethod
    def of(cls, config: Config) -> Quantization | None:
        """What the flags ask for."""
        return cls(config) if config.model.quantizes else None

    def on_train_start(self, trainer: Trainer) -> None:
        if self.config.model.quantize_weights is not None:
            whole = HybridModel(make_layer_context(self.config.model, ParallelContext.single("meta")))
            print_rank_0(describe(self.config, quantized_size(whole)))
        self._set(trainer, trainer.iteration + 1)

    def on_step_start(self, trainer: Trainer) -> None:
        self._set(trainer, trainer.iteration + 1)

    def _set(self, trainer: Trainer, step: int) -> None:
        share = self.flags.share_at(step)
        if self.stages:
            stage = self.flags.stage_at(step)
            if stage is not self._stage:
                self._enter(trainer, stage)
            trainer.lr_factors["quant_stage"] = stage.lr
            trainer.optimizer.decay_factor = stage.wd
            share = 0.0 if stage.weights == "none" else stage.share
        for _, _, op in quantized_layers(trainer.model):
            op.share = share

    def _enter(self, trainer: Trainer, stage: QuantStage) -> None:
        self._stage = stage
        if len(self.stages) > 1:
            print_rank_0(f"quantization from iteration {max(stage.start, trainer.iteration) + 1} on: {_told(stage)}")
        bits = {"int8": 8, "int4": 4}.get(stage.activations)
        asymmetric = self.config.model.asymmetric_activations
        for _, _, op in quantized_layers(trainer.model):
            op.activations = None if bits is None else ActivationScheme(bits, asymmetric)
            if stage.weights != "none" and op.weights is not None:
                asked = self.config.model.asymmetric_weights and stage.weights in ("int4", "int8")
                op.set_weights(dataclasses.replace(op.weights, kind=stage.weights, asymmetric=asked))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        trainer.lr_factors.pop("quant_stage", None)
        if self.flags.quant_lambda is not None or self.stages:
            shares = [op.share for _, _, op in quantized_layers(trainer.model)]
            metrics.extra["quant_lambda"] = self.flags.share_at(metrics.iteration) if not shares else shares[0]
        if self._log_interval and metrics.iteration % self._log_interval == 0:
            trainer.optimizer.wait_for_parameters()
            own = [self._statistics.sums(stage, trainer.ctx) for stage in trainer.model.chunks]
            everywhere = exchange(trainer.ctx, [sum(column) for column in zip(*own, strict=True)])
            metrics.extra.update(WeightStatistics.metrics([sum(column) for column in zip(*everywhere, strict=True)]))


def _told(stage: QuantStage) -> str:
    weights = "full precision" if stage.weights == "none" else f"{stage.weights} weights, activations "
    read = "" if stage.weights == "none" else "as they are" if stage.activations == "none" else stage.activations
    rest = "".join(f", {name} x {value:g}" for name, value in (("lr", stage.lr), ("wd", stage.wd)) if value != 1)
    return weights + read + rest + (f", lambda {stage.share:g}" if stage.share != 1 else "")


def describe(config: Config, size: QuantizedSize) -> str:
    """One line on what is quantized."""
    kind = config.model.activation_kind
    read = "activations as they are" if kind is None else f"{kind} activations"
    return (
        f"{config.model.quantize_weights} weights, {read}: {size.matrices} matrices with "
        f"{size.elements / size.all_elements:.1%} of the weights ({', '.join(size.kept)} stay as they are); packed "
        f"{size.packed_bytes / 1e6:,.2f} MB, in 16 bits {size.full_bytes / 1e6:,.2f} MB ({size.compression:.2f}x)"
    )
