"""The definitions of what a cross-entropy takes from rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def label_scores_reference(logits: Tensor, target: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of ``logits`` [T, V]: the largest of the first ``columns``, the sum of exp(logit - largest) of
    them, and the one in column ``target``, or 0 where that is not among them. Without columns: -inf, 0, 0."""
    logits = logits[:, :columns]
    if columns == 0:
        nothing = logits.new_zeros(len(logits))
        return nothing - float("inf"), nothing, nothing
    peak, here = logits.amax(1), (target >= 0) & (target < columns)
    picked = logits.gather(1, target.where(here, 0).unsqueeze(1)).squeeze(1)
    return peak, (logits - peak.unsqueeze(1)).exp().sum(1), picked.where(here, 0)


def label_gradients_reference(
    logits: Tensor, target: Tensor, columns: int, base: Tensor, share: Tensor, weights: Tensor
) -> Tensor:
    """``exp(logit - base) * share``, less ``weights`` in column ``target`` [T, V]; zero beyond ``columns``."""
    column = torch.arange(logits.shape[1], device=logits.device)
    found = (logits - base.unsqueeze(1)).exp() * share.unsqueeze(1)
    found = found - (column == target.unsqueeze(1)) * weights.unsqueeze(1)
    return found.where(column < columns, 0)
