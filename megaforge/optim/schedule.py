"""The learning rate as a pure function of the iteration."""

from __future__ import annotations

import hashlib
import json
import math

from megaforge.config.optimizer_config import OptimizerConfig


class LearningRateSchedule:
    """Linear warm-up to ``--lr``, then a decay to ``--min-lr`` that ends at ``--lr-decay-iters``; constant after.

    Styles: ``cosine`` (Loshchilov & Hutter, arXiv 1608.03983), ``linear``, ``constant``, and ``WSD``: constant until
    a final decay of ``--lr-wsd-decay-iters`` (warm-up, stable, decay: arXiv 2404.06395) along one minus a square root,
    which Hägele et al. (arXiv 2405.18392) found best.
    """

    def __init__(self, config: OptimizerConfig, train_iters: int) -> None:
        self.style = config.lr_decay_style
        self.peak, self.floor = config.lr, config.min_lr
        self.warmup_iters = config.lr_warmup_iters
        self.decay_iters = config.lr_decay_iters or train_iters
        self.wsd_decay_iters = config.lr_wsd_decay_iters or max(1, self.decay_iters // 10)

    def __call__(self, iteration: int) -> float:
        """The learning rate of optimizer step ``iteration``; the first step is 1.

        Step ``lr_warmup_iters`` is the first at ``--lr`` and step ``lr_decay_iters`` the first at ``--min-lr``.
        """
        if iteration < 1:
            raise ValueError(f"iterations count from 1, got {iteration}")
        if iteration <= self.warmup_iters:
            return self.peak * iteration / self.warmup_iters
        if self.style == "constant":
            return self.peak
        start = self.warmup_iters
        if self.style == "WSD":
            start = max(start, self.decay_iters - self.wsd_decay_iters)
            if iteration <= start:
                return self.peak
        if iteration >= self.decay_iters:
            return self.floor
        progress = (iteration - start) / (self.decay_iters - start)
        return self.floor + (self.peak - self.floor) * _remaining(self.style, progress)

    @property
    def digest(self) -> str:
        """sha256 of what the rates depend on: two schedules with one digest give the same rates."""
        facts = [self.style, self.peak, self.warmup_iters]
        if self.style != "constant":
            facts += [self.floor, self.decay_iters]
        if self.style == "WSD":
            facts.append(self.wsd_decay_iters)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _remaining(style: str, progress: float) -> float:
    """The share of (peak - floor) that is left after ``progress`` (0 to 1) of the decay."""
    if style == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if style == "linear":
        return 1 - progress
    return 1 - math.sqrt(progress)
