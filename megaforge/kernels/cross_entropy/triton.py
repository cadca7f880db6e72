"""A cross-entropy's part of rows of logits by Triton kernels (:mod:`.triton_kernels`): one pass each way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megaforge.kernels.cross_entropy.fused import FusedScores
from megaforge.kernels.native import takes_triton, triton_kernels

_kernels = functools.partial(triton_kernels, "cross_entropy")


def takes(logits: Tensor) -> bool:
    """Whether tensors like ``logits`` go through the Triton kernels."""
    return takes_triton("cross_entropy", "the head's cross-entropy", logits)


class TritonScores(FusedScores):
    """By the Triton kernels."""

    def _walk(self) -> Tensor:
        kernels, _ = _kernels()
        rows, width = self._logits.shape
        found = torch.empty(3, rows, dtype=torch.float32, device=self._logits.device)
        if rows:
            kernels.scores[(rows,)](
                self._logits, self._target, *found, width, self._columns,
                tiles=-(-self._columns // kernels.WIDTH),
                wide=kernels.tl.float32, block_width=kernels.WIDTH, num_warps=8,
            )  # fmt: skip
        return found

    def _replace(self, base: Tensor, share: Tensor, weight: Tensor) -> None:
        kernels, _ = _kernels()
        rows, width = self._logits.shape
        numbers = (x.to(torch.float32).contiguous() for x in (base, share, weight))
        if self._logits.numel():
            kernels.gradients[(rows, -(-width // kernels.WIDTH))](
                self._logits, self._target, *numbers, width, self._columns,
                wide=kernels.tl.float32, block_width=kernels.WIDTH, num_warps=8,
            )  # fmt: skip
