"""What a policy, and a value function beside it, is trained by: losses of single decisions, to be summed with weights.
Pure functions of log-probabilities, of any shape."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    new: Tensor, old: Tensor, advantage: Tensor, *, low: float, high: float, dual: float | None = None
) -> Tensor:
    """-min(ratio A, clip(ratio) A), ratio = exp(new - old) within 1 - low and 1 + high (PPO, Schulman et al., arXiv
    1707.06347; a ``high`` of its own: DAPO, 2503.14476).

    Args:
        new, old: log-probabilities of what was decided; gradients go through ``new``.
        dual: of a negative advantage the loss is at most this times its size (Ye et al., arXiv 1912.09729).
    """
    ratio = (new - old).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)


def is_clipped(new: Tensor, old: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """Bool: where the clipping of :func:`clipped_surrogate` takes the gradient away."""
    ratio = (new - old).exp()
    return ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """e^d - d - 1, d = reference - new: an estimate of KL(new || reference) that is never negative (Schulman,
    "Approximating KL divergence"; GRPO's, verl's ``low_var_kl``)."""
    d = reference - new
    return d.expm1() - d


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error, the larger of that of ``values`` and that of ``values`` held within ``clip`` of the old
    ones; None: the former."""
    loss = (values - returns) ** 2
    if clip is not None:
        held = old + (values - old).clamp(-clip, clip)
        loss = torch.maximum(loss, (held - returns) ** 2)
    return loss / 2


def entropy(log_probs: Tensor) -> Tensor:
    """In nats, of the distributions in the last dimension; what cannot be chosen has -inf."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0)).sum(-1)


def adapted(coefficient: float, kl: float, target: float, horizon: float) -> float:
    """The factor on the KL divergence for the next step: it grows where that is above ``target`` and falls below it, by
    at most a fifth in ``horizon`` steps (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    return coefficient * (1 + max(-0.2, min(0.2, kl / target - 1)) / horizon)
