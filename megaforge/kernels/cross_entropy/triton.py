"""A cross-entropy's part of rows of logits by Triton kernels (:mod:`.triton_kernels`): one pass each way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megaforge.kernels.native import takes_triton, triton_kernels

_kernels = functools.partial(triton_kernels, "cross_entropy")


def takes(logits: Tensor) -> bool:
    """Whether tensors like ``logits`` go through the Triton kernels."""
    return takes_triton("cross_entropy", "the head's cross-entropy", logits)


class FusedScores:
    """See :class:`megaforge.kernels.cross_entropy.plain.Scores`; the logits stay as they are until a gradient takes
    their place."""

    def __init__(self, logits: Tensor, target: Tensor, columns: int) -> None:
        self._logits, self._target, self._columns = logits.contiguous(), target.contiguous(), columns
        self._found: tuple[Tensor, ...] | None = None

    def _scores(self) -> tuple[Tensor, ...]:
        if self._found is None:
            kernels, _ = _kernels()
            rows, width = self._logits.shape
            found = torch.empty(3, rows, dtype=torch.float32, device=self._logits.device)
            if rows:
                kernels.scores[(rows,)](
                    self._logits, self._target, *found, width, self._columns,
                    tiles=-(-self._columns // kernels.WIDTH),
                    wide=kernels.tl.float32, block_width=kernels.WIDTH, num_warps=8,
                )  # fmt: skip
            self._found = found.unbind()
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
        return self._gradients(self._base, weights / total, weights)

    def gradients(self, log_sums: Tensor, grad: Tensor) -> Tensor:
        return self._gradients(log_sums, grad, grad)

    def _gradients(self, *of_rows: Tensor) -> Tensor:
        kernels, _ = _kernels()
        rows, width = self._logits.shape
        if self._logits.numel():
            kernels.gradients[(rows, -(-width // kernels.WIDTH))](
                self._logits, self._target, *(x.to(torch.float32).contiguous() for x in of_rows), width, self._columns,
                wide=kernels.tl.float32, block_width=kernels.WIDTH, num_warps=8,
            )  # fmt: skip
        return self._logits
