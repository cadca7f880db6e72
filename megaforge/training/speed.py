"""How fast a run is on this machine, and how much memory it takes: added to what each step reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaforge.device import page_faults, peak_memory_bytes, reserved_memory_bytes
from megaforge.models.flops import model_flops_per_token
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.param_spec import ParamSpec, named_specs
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import StepMetrics
from megaforge.training.peak_flops import measure_matmul_peak

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class Speed(Callback):
    """Comes before the callbacks that read what it adds; every rank holds one.

    Attributes:
        parameters: of the whole model.
        trained_share: of them that are trained.
        flops_per_token: a forward and backward pass of the whole model.
        peak: FLOP/s of matrix products, of all ranks together.
    """

    place = Place.BEFORE

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.parameters = 0
        self.trained_share = 1.0
        self.flops_per_token = 0.0
        self.peak = 0.0
        self._faults = self._steps = 0

    def on_train_start(self, trainer: Trainer) -> None:
        self.peak = measure_matmul_peak(trainer.ctx, compute_dtype(trainer.config.training))
        # A rank may hold only some stages of the model: the whole one is built without memory.
        whole = HybridModel(make_layer_context(trainer.config.model, ParallelContext.single("meta")))
        sizes = [(spec.codes_of or spec.numel, p.requires_grad) for spec, p in named_specs(whole) if _counts(spec)]
        self.parameters = sum(size for size, _ in sizes)
        self.trained_share = sum(size for size, trained in sizes if trained) / self.parameters
        self.flops_per_token = model_flops_per_token(whole, trainer.config.data.seq_length)
        self._faults, self._steps = page_faults(), 0

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        metrics.extra["mfu"] = round(self.utilization(metrics.tokens_per_second), 4)
        self._steps += 1
        if metrics.iteration % self.interval == 0:
            metrics.extra.update(_greatest(trainer.ctx, self._memory(trainer.ctx.device)))
            self._faults, self._steps = page_faults(), 0
            if trainer.config.model.peft is not None:
                metrics.extra["trained_share"] = self.trained_share

    def _memory(self, device: torch.device) -> dict[str, int]:
        """This rank's memory, and how well its pool serves it."""
        if device.type == "cuda":
            pool = {"reserved_memory_bytes": reserved_memory_bytes(device)}
        else:
            pool = {"page_faults": (page_faults() - self._faults) // self._steps}
        return {"peak_memory_bytes": peak_memory_bytes(device)} | pool

    def utilization(self, tokens_per_second: float) -> float:
        """The share of :attr:`peak` that the model's arithmetic makes use of (MFU; Chowdhery et al., arXiv
        2204.02311, with the measured rate in place of the data sheet's)."""
        return tokens_per_second * self.flops_per_token / self.peak


def _counts(spec: ParamSpec) -> bool:
    """Whether it is a weight, or codes of one: scales of codes are a part of these."""
    return not spec.frozen or spec.role != "state" or spec.codes_of > 0


def _greatest(ctx: ParallelContext, values: dict[str, int]) -> dict[str, float]:
    """The greatest of each of ``values`` on any rank. Collective."""
    most = torch.tensor(list(values.values()), dtype=torch.int64)
    if ctx.control is not None:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=ctx.control)
    return dict(zip(values, most.tolist(), strict=True))
