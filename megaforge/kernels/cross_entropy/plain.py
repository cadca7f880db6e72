"""A cross-entropy's part of rows of logits in plain torch, in place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Scores(Protocol):
    """Rows of logits and the columns of their labels. The methods are called in this order, and some use the logits up:
    ``sums`` and then, if anything, ``gradients_of_sum``; or ``gradients`` alone."""

    @property
    def picked(self) -> Tensor:
        """The logit of each label, [T] in fp32 (fp64 for fp64); 0 where it is held elsewhere."""

    @property
    def peak(self) -> Tensor:
        """The largest logit of each row, likewise; -inf where no columns take part."""

    def sums(self, peak: Tensor) -> Tensor:
        """The sum of exp(logit - peak) of each row, likewise; ``peak``: at least :attr:`peak`."""

    def gradients_of_sum(self, total: Tensor, weights: Tensor) -> Tensor:
        """Of the sum of weight * loss, like the logits; ``total``: :meth:`sums` of all columns, wherever they are."""

    def gradients(self, log_sums: Tensor, grad: Tensor) -> Tensor:
        """From ``grad`` [T], that of each loss, like the logits; ``log_sums``: the log of the sum of exp(logit)."""


class PlainScores:
    """See :class:`Scores`."""

    def __init__(self, logits: Tensor, target: Tensor, columns: int) -> None:
        self._dtype = logits.dtype
        self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._logits[:, columns:] = float("-inf")
        self._here = (target >= 0) & (target < columns)
        self._target = target.masked_fill(~self._here, 0).unsqueeze(1)

    @property
    def picked(self) -> Tensor:
        return self._logits.gather(1, self._target).squeeze(1).masked_fill(~self._here, 0)

    @property
    def peak(self) -> Tensor:
        return self._logits.amax(dim=1)

    def sums(self, peak: Tensor) -> Tensor:
        return self._logits.sub_(peak.unsqueeze(1)).exp_().sum(dim=1)

    def gradients_of_sum(self, total: Tensor, weights: Tensor) -> Tensor:
        dlogits = self._logits.mul_((weights / total).unsqueeze(1))
        return dlogits.scatter_add_(1, self._target, -(self._here * weights).unsqueeze(1)).to(self._dtype)

    def gradients(self, log_sums: Tensor, grad: Tensor) -> Tensor:
        dlogits = self._logits.sub_(log_sums.unsqueeze(1)).exp_()
        dlogits.scatter_add_(1, self._target, -self._here.to(dlogits.dtype).unsqueeze(1))
        return dlogits.mul_(grad.unsqueeze(1)).to(self._dtype)
