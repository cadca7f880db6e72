"""Activation recomputation: a part of the forward pass keeps its inputs only and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``; when ``active`` and gradients are wanted, nothing inside it is kept for the backward pass,
    which computes it again (Chen et al., arXiv 1604.06174).

    The function must only return what it computes: a count it added to somewhere else would be added twice. Random
    states are set back for the second run. Every output may carry gradient, so router losses and RWKV's v_first are
    outputs like any other.
    """
    if active and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
