"""What forms that walk over logits as they are have alike."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class FusedScores(ABC):
    """See :class:`megaforge.kernels.cross_entropy.plain.Scores`; the logits stay as they are until a gradient takes
    their place."""

    def __init__(self, logits: Tensor, target: Tensor, columns: int) -> None:
        self._logits, self._target, self._columns = logits.contiguous(), target.contiguous(), columns
        self._found: tuple[Tensor, ...] | None = None

    @abstractmethod
    def _walk(self) -> Tensor:
        """Of each row the largest logit, the sum of exp(logit - largest) and the target's logit, or 0: fp32 [3, T]."""

    @abstractmethod
    def _replace(self, base: Tensor, share: Tensor, weight: Tensor) -> None:
        """Puts exp(logit - base) * share, less weight in the target's column, in the logits' place."""

    def _scores(self) -> tuple[Tensor, ...]:
        if self._found is None:
            self._found = self._walk().unbind()
        return self._found

    @property
    def picked(self) -> Tensor:
        return self._scores()[2]

    @property
    def peak(self) -> Tensor:
        return self._scores()[0].clone()  # ranks take the largest in place

    def sums(self, peak: Tensor) -> Tensor:
        own, total, _ = self._scores()
        self._base = peak
        return total * (own - peak).exp()

    def gradients_of_sum(self, total: Tensor, weights: Tensor) -> Tensor:
        self._replace(self._base, weights / total, weights)
        return self._logits

    def gradients(self, log_sums: Tensor, grad: Tensor) -> Tensor:
        self._replace(log_sums, grad, grad)
        return self._logits
