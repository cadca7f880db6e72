"""A data source with what the flags change in its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.augment.augmentation import Augmentation
from megaforge.data.data_source import DataSource
from megaforge.data.tokenizer import Tokenizer
from megaforge.data.wrapped import WrappedSource
from megaforge.errors import UserError
from megaforge.registry import AUGMENTATIONS


class AugmentedSource(WrappedSource):
    """``source`` with every augmentation of ``augmentations`` in turn, in training alone: evaluations read it as it is.
    Which sample is the k-th does not change."""

    def __init__(self, source: DataSource, augmentations: Sequence[Augmentation]) -> None:
        super().__init__(source)
        self._augmentations = augmentations

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        filled = self.source.fill(k, tokens, marks)
        for one in self._augmentations:
            one.rewrite(k, self.source.domain(k), tokens, marks)
        return filled

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        for one in self._augmentations:
            inputs = one.shown(k, inputs)
        return inputs

    def state(self, consumed_samples: int) -> dict[str, Any]:
        described = {"augmentation": self._described()} if self._augmentations else {}
        return self.source.state(consumed_samples) | described

    def check_state(self, saved: dict[str, Any]) -> None:
        self.source.check_state({name: value for name, value in saved.items() if name != "augmentation"})
        check_augmentation(self._described(), saved)

    def _described(self) -> dict[str, Any]:
        return {name: value for one in self._augmentations for name, value in one.state().items()}


def check_augmentation(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuses to go on from a checkpoint whose samples were changed otherwise.

    Raises:
        UserError: names a flag that differs.
    """
    before = saved.get("augmentation", {})
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"the checkpoint's samples were changed otherwise as they were read: {name} was {before.get(name)} and "
                f"is now {now.get(name)}; restore it, add --reset-data to go on with these data from their beginning, "
                "or start a new run without --load"
            )


def augmentations_of(config: Config, tokenizer: Tokenizer | None) -> list[Augmentation]:
    """What the flags ask for.

    Raises:
        UserError: the tokenizer lacks a token that one needs.
    """
    asked = (AUGMENTATIONS.get(name).of(config, tokenizer) for name in AUGMENTATIONS.names())
    return [one for one in asked if one is not None]


def augmented(source: DataSource, config: Config, tokenizer: Tokenizer | None) -> DataSource:
    """``source`` with what the flags ask for, which may be nothing."""
    return AugmentedSource(source, augmentations_of(config, tokenizer))
