"""When what comes again and again is due: by iterations, or by epochs of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


@dataclass(frozen=True)
class Interval:
    """Attributes:
    iterations: due after each iteration divisible by it; 0: never.
    tokens: if not 0, due in its place after each step that reads beyond a multiple of so many training tokens, or up
        to it. Nothing has to be kept: a step knows what was read before it and behind it.
    """

    iterations: int = 0
    tokens: Fraction = Fraction(0)

    def __bool__(self) -> bool:
        """Whether it is ever due."""
        return bool(self.iterations or self.tokens)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether it is after the step that ``trainer`` has just done."""
        if self.tokens:
            return trainer.consumed_tokens // self.tokens > trainer.tokens_before_step // self.tokens
        return self.iterations > 0 and trainer.iteration % self.iterations == 0
