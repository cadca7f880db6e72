"""The definition of causal attention: the oracle of its other forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Arguments and results as :func:`megaforge.kernels.attention.causal_attention`; holds all scores at once."""
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ value


def largest_logits_reference(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """What :func:`megaforge.kernels.attention.largest_logits.largest_logits` gives, of all scores at once; ``visible``:
    bool, broadcastable to [b, heads, s, t]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).masked_fill(~visible, -math.inf)
    return scores.amax((0, 2, 3))
