"""The definition: a linear layer."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: [m, k], [n, k] and [n] -> [m, n]."""
    product = x @ weight.t()
    return product if bias is None else product + bias
