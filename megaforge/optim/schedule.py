"""The learning rate as a pure function of the iteration."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from megaforge.config.lr_shapes import RateSettings, RateShape
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.registry import LR_SCHEDULES

_FIELDS = dataclasses.fields(RateSettings)
_EVERYWHERE = ("lr", "lr_warmup_iters", "lr_warmup_init", "unit")


class LearningRateSchedule:
    """Linear warm-up from ``--lr-warmup-init`` to ``--lr``, then the shape that ``--lr-decay-style`` names
    (:mod:`megaforge.config.lr_shapes`).

    Attributes:
        style: the shape's name.
        settings: what the rates depend on.
    """

    def __init__(self, config: OptimizerConfig, train_iters: int) -> None:
        """
        Raises:
            UserError: no such shape is registered.
        """
        self.style = config.lr_decay_style
        self.settings = RateSettings.of(config, train_iters)
        self._shape: RateShape = LR_SCHEDULES.get(self.style)

    def __call__(self, iteration: int) -> float:
        """The learning rate of optimizer step ``iteration``; the first step is 1.

        Step ``lr_warmup_iters`` is the first at ``--lr`` and, where the shape falls to it, step ``lr_decay_iters`` the
        first at ``--min-lr``.
        """
        if iteration < 1:
            raise ValueError(f"iterations count from 1, got {iteration}")
        s = self.settings
        if iteration <= s.lr_warmup_iters:
            return s.lr_warmup_init + (s.lr - s.lr_warmup_init) * iteration / s.lr_warmup_iters
        return self._shape.rate(s, iteration)

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
