"""A cross-entropy's part of rows of logits compiled for CPUs, in fp32 and bf16 with fp32 arithmetic: one walk over the
logits, as they are, each way. The code is in ``csrc/pointwise``."""

from __future__ import annotations

import torch
from torch import Tensor

from megaforge.kernels.cross_entropy.fused import FusedScores
from megaforge.kernels.native import define, load, say_uncompiled

DTYPES = (torch.float32, torch.bfloat16)


def takes(logits: Tensor) -> bool:
    """Whether there is compiled code for tensors like ``logits``. On a CPU it says once where it is missing."""
    if logits.device.type != "cpu" or logits.dtype not in DTYPES:
        return False
    if not COMPILED:
        say_uncompiled("pointwise", "cpu")
    return COMPILED


class CompiledScores(FusedScores):
    """By the operators below."""

    def _walk(self) -> Tensor:
        found: Tensor = torch.ops.megaforge.label_scores(self._logits, self._target, self._columns)
        return found

    def _replace(self, base: Tensor, share: Tensor, weight: Tensor) -> None:
        numbers = (x.to(torch.float32) for x in (base, share, weight))
        torch.ops.megaforge.label_gradients_(self._logits, self._target, *numbers, self._columns)


# Of each row the largest logit, the sum of exp(logit - largest) and the target's logit, or 0: [3, T] in fp32.
define(
    "label_scores(Tensor logits, Tensor target, int columns) -> Tensor",
    lambda logits, target, columns: logits.new_empty(3, logits.shape[0], dtype=torch.float32),
)
# In the logits' place exp(logit - base) * share, less weight in the target's column.
define(
    "label_gradients_(Tensor(a!) logits, Tensor target, Tensor base, Tensor share, Tensor weight, int columns) -> ()",
    lambda logits, target, base, share, weight, columns: None,
)
# A library that was built before these operators has none of their code.
COMPILED = "cpu" in load("pointwise") and torch._C._dispatch_has_kernel_for_dispatch_key(
    "megaforge::label_scores", "CPU"
)
