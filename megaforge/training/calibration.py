"""``--online-calibration``: static steps of activations, from an average of the largest values that layers see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.qat_config import QATConfig
from megaforge.quant.ranges import Ranges
from megaforge.quant.statistics import quantized_layers
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class Calibration(Callback):
    """Every ``--calibration-interval`` iterations, from the first on, the next steps are watched until they have read
    ``--calibration-samples``: the largest value of each step's global batch enters the average of its layer. Until the
    first step is done, each token has a step of its own.

    Which steps are watched is a function of the iteration, and the ranges are kept with the weights: there is no other
    state. A step that overflowed is not taken in.
    """

    place = Place.BEFORE

    def __init__(self, flags: QATConfig) -> None:
        self.flags = flags
        self._ranges: list[Ranges] = []
        self._due = False

    @classmethod
    def of(cls, config: Config) -> Calibration | None:
        """What the flags ask for."""
        return cls(config.qat) if config.model.online_calibration else None

    def on_train_start(self, trainer: Trainer) -> None:
        self._ranges = [ranges for ranges in ranges_of(trainer.model) if ranges.input is not None]
        steps, interval = self._steps(trainer), self.flags.calibration_interval
        print_rank_0(
            f"activations have static steps, calibrated on {steps * trainer.batches.size} samples ({steps} iterations) "
            f"every {interval} iterations"
        )

    def _steps(self, trainer: Trainer) -> int:
        """Steps of a calibration."""
        return min(math.ceil(self.flags.calibration_samples / trainer.batches.size), self.flags.calibration_interval)

    def on_step_start(self, trainer: Trainer) -> None:
        self._due = trainer.iteration % self.flags.calibration_interval < self._steps(trainer)
        for ranges in self._ranges:
            ranges.watches, ranges.seen = self._due, None

    @torch.no_grad()
    def on_update(self, trainer: Trainer) -> None:
        inputs: list[Tensor] = [ranges.input for ranges in self._ranges if ranges.input is not None]
        if not self._due or not inputs:
            return
        before = torch.stack([one.detach() for one in inputs])
        unseen = torch.zeros_like(before[0])
        found = torch.stack([unseen if ranges.seen is None else ranges.seen for ranges in self._ranges])
        for axis in (trainer.ctx.tp, trainer.ctx.dp_cp):
            if axis.size > 1:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=axis.group)
        known, usable = before.any(1, keepdim=True), found.isfinite().all(1, keepdim=True) & found.any(1, keepdim=True)
        mean = torch.where(known, torch.lerp(found, before, self.flags.calibration_ema), found)
        torch._foreach_copy_(inputs, list(torch.where(usable, mean, before).unbind()))

    def on_train_end(self, trainer: Trainer) -> None:
        for ranges in self._ranges:
            ranges.watches, ranges.seen = False, None


def ranges_of(model: nn.Module) -> list[Ranges]:
    """Of the quantized layers of ``model`` that have some, in module order."""
    return [op.ranges for _, _, op in quantized_layers(model) if op.ranges is not None]
