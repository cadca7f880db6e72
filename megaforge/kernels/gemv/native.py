"""The operator ``torch.ops.megaforge.gemv``. Its code for CPUs is in ``csrc/gemv``; elsewhere it is torch's product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megaforge.kernels.native import define, load

define(
    "gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]), F.linear,
)  # fmt: skip

COMPILED = load("gemv")
# A packet (torch.ops.megaforge.gemv) looks for the overload at each call: microseconds, where a product has few.
GEMV = torch.ops.megaforge.gemv.default
