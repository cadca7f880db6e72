"""A toy loss term: the mean square of the labels' cross-entropy, a tenth of it in the loss."""

from __future__ import annotations

from collections.abc import Callable

from megaforge.config.config import Config
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.registry import LOSS_TERMS


def squares(config: Config) -> Callable[[ModelOutput], LossTerm]:
    return lambda output: LossTerm((output.losses_SB**2 * output.mask_SB).sum(), "labels", weight=0.1)


LOSS_TERMS.register("squares", squares)
