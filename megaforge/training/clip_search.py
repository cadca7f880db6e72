"""``--quant-clip``: how far levels reach, chosen from a small grid by the validation loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.qat_config import QATConfig
from megaforge.parallel.agree import exchange
from megaforge.quant.statistics import quantized_layers
from megaforge.training.calibration import ranges_of
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

PARTS = ("weights", "activations")
_BETTER = 1e-6  # a share of the loss: by less, sums in another order would choose otherwise


class ClipSearch(Callback):
    """Every ``--quant-clip-interval`` iterations the model is evaluated with each factor of ``--quant-clip-grid`` on
    the ranges of its weights, then of its activations; the factor of the least loss stays, the present one where none
    is better. Factors are of the whole model, and are kept with its weights."""

    place = Place.BEFORE

    def __init__(self, clips: str, flags: QATConfig) -> None:
        self.parts = PARTS if clips == "both" else (clips,)
        self.grid, self.interval = flags.quant_clip_grid, flags.quant_clip_interval
        self.factors = dict.fromkeys(self.parts, 1.0)

    @classmethod
    def of(cls, config: Config) -> ClipSearch | None:
        """What the flags ask for."""
        clips = config.model.quant_clip
        return None if clips == "none" else cls(clips, config.qat)

    def on_train_start(self, trainer: Trainer) -> None:
        own = [ranges.clip.tolist() for ranges in ranges_of(trainer.model)[:1] if ranges.clip is not None]
        known = next((one[0] for one in exchange(trainer.ctx, own) if one), [1.0, 1.0])
        self.factors = {part: round(known[PARTS.index(part)], 6) for part in self.parts}

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration % self.interval == 0:
            trainer.optimizer.wait_for_parameters()
            for part in self.parts:
                self._choose(trainer, part)
        for part, factor in self.factors.items():
            metrics.extra[f"quant_clip_{part}"] = factor

    def _choose(self, trainer: Trainer, part: str) -> None:
        present, losses = self.factors[part], dict[float, float]()
        for factor in dict.fromkeys((present, *self.grid)):
            self._set(trainer, part, factor)
            losses[factor] = trainer.measure().loss
        best = min(losses, key=lambda factor: losses[factor] if math.isfinite(losses[factor]) else math.inf)
        if not losses[best] < losses[present] * (1 - _BETTER) and math.isfinite(losses[present]):
            best = present
        self._set(trainer, part, best)
        self.factors[part] = best
        told = ", ".join(f"{losses[factor]:.5g} at {factor:g}" for factor in sorted(losses))
        print_rank_0(f"iteration {trainer.iteration}: clip of {part} {best:g} (validation loss {told})")

    @torch.no_grad()
    def _set(self, trainer: Trainer, part: str, factor: float) -> None:
        for _, _, op in quantized_layers(trainer.model):
            if op.ranges is not None and op.ranges.clip is not None:
                op.ranges.clip[PARTS.index(part)] = factor
                op.forget()
