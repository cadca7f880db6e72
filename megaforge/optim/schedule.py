"""The learning rate as a pure function of the iteration."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from fractions import Fraction
from typing import Protocol

from megaforge.config.length_config import LengthConfig
from megaforge.config.lr_shapes import RateSettings, RateShape
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.registry import LR_SCHEDULES

_FIELDS = dataclasses.fields(RateSettings)
_EVERYWHERE = ("lr", "lr_warmup_iters", "lr_warmup_init", "unit")


class Counted(Protocol):
    """What has been read after each iteration: :class:`megaforge.training.lengths.Progress`."""

    def at(self, iteration: int) -> tuple[int, int]:
        """(tokens, samples) read after ``iteration``."""

    def first_at(self, tokens: Fraction | int = 0, samples: int = 0) -> int:
        """The first iteration after which so many have been read."""


class LearningRateSchedule:
    """Linear warm-up from ``--lr-warmup-init`` to ``--lr``, then the shape that ``--lr-decay-style`` names
    (:mod:`megaforge.config.lr_shapes`).

    Attributes:
        style: the shape's name.
        settings: what the rates depend on.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        train_iters: int,
        length: LengthConfig | None = None,
        progress: Counted | None = None,
    ) -> None:
        """
        Args:
            length, progress: lengths in samples, and how many samples each iteration has read: where the schedule is
                given in samples throughout, it counts them (:meth:`RateSettings.in_samples`).

        Raises:
            UserError: no such shape is registered.
        """
        self.style, self._progress = config.lr_decay_style, progress
        counted = None if length is None or progress is None else RateSettings.in_samples(config, length)
        self.settings = counted or RateSettings.of(config, train_iters)
        self._shape: RateShape = LR_SCHEDULES.get(self.style)

    def __call__(self, iteration: int) -> float:
        """The learning rate of optimizer step ``iteration``; the first step is 1.

        Step ``lr_warmup_iters`` is the first at ``--lr`` and, where the shape falls to it, step ``lr_decay_iters`` the
        first at ``--min-lr``. Where samples are counted, a step stands for all that are read up to its end.
        """
        if iteration < 1:
            raise ValueError(f"iterations count from 1, got {iteration}")
        s = self.settings
        step = iteration
        if self._progress is not None and s.unit == "samples":
            step = self._progress.at(iteration)[1]
        if step <= s.lr_warmup_iters:
            return s.lr_warmup_init + (s.lr - s.lr_warmup_init) * step / s.lr_warmup_iters
        return self._shape.rate(s, step)

    def between(self, lr: float, min_lr: float) -> LearningRateSchedule:
        """The same schedule with other rates at its peak and its end."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, lr=lr, min_lr=min_lr)
        return other

    @property
    def corners(self) -> set[int]:
        """The iterations around which the built-in shapes bend."""
        s = self.settings
        bends = (int(b) for b in (s.lr_warmup_iters, s.lr_decay_iters - s.lr_wsd_decay_iters, s.lr_decay_iters))
        if self._progress is not None and s.unit == "samples":
            bends = (self._progress.first_at(samples=bend) - 1 for bend in bends)
        return {bend + more for bend in bends for more in (0, 1)}

    @property
    def facts(self) -> dict[str, float | str]:
        """What the rates depend on besides the style, by the flags' names with underscores."""
        used = (*_EVERYWHERE, *self._shape.reads)
        return {field.name: getattr(self.settings, field.name) for field in _FIELDS if field.name in used}

    @property
    def callbacks(self) -> tuple[str, ...]:
        """Names of the callbacks that belong to the shape."""
        return self._shape.callbacks

    @property
    def is_flat(self) -> bool:
        """Whether it is ``--lr`` for ever once the warm-up is over."""
        return self.facts.keys() <= set(_EVERYWHERE)

    @property
    def digest(self) -> str:
        """sha256 of what the rates depend on: two schedules with one digest give the same rates."""
        facts: list[object] = [self.style]
        later = {field.name: field.default for field in _FIELDS if field.default is not dataclasses.MISSING}
        for name, value in self.facts.items():
            if name not in later:
                facts.append(value)
            elif value != later[name]:  # older checkpoints do not know it: its default is not said
                facts.append([name, value])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
