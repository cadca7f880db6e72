"""How evenly experts are used, and what full ones leave out: the numbers of each layer, and of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaforge.config.expert_layers import ExpertLayers
from megaforge.device import upload


def entropy_bits(tokens_per_expert: Tensor) -> Tensor:
    """Entropy in bits of the experts' shares, [layers]: log2(E) when every expert gets as much as any other.

    Args:
        tokens_per_expert: float64 [layers, E] counts; a layer of fewer experts has zeros at the end.
    """
    shares = tokens_per_expert / tokens_per_expert.sum(dim=1, keepdim=True).clamp(min=1.0)
    return -(shares * shares.clamp(min=1e-300).log2()).sum(dim=1)


def greatest_loads(tokens_per_expert: Tensor, experts: Sequence[int]) -> Tensor:
    """The most tokens that an expert got, as a multiple of its layer's mean, [layers]: 1 when all get alike, E when one
    gets all, 0 without tokens.

    Args:
        tokens_per_expert: float64 [layers, E] counts.
        experts: how many each layer has.
    """
    busiest, total = tokens_per_expert.amax(dim=1), tokens_per_expert.sum(dim=1).clamp(min=1.0)
    return busiest * _numbers(tokens_per_expert, experts) / total


def shares_used(tokens_per_expert: Tensor, experts: Sequence[int]) -> Tensor:
    """Experts that a layer's tokens go to, by the entropy of their shares (2 to its power), as a share of the layer's
    experts, [layers]: 1 when all get alike, k / E when the same k get all. Arguments as :func:`greatest_loads`."""
    return entropy_bits(tokens_per_expert).exp2() / _numbers(tokens_per_expert, experts)


def _numbers(tokens_per_expert: Tensor, experts: Sequence[int]) -> int | Tensor:
    """How many experts each layer has; one number where these agree."""
    most = tokens_per_expert.shape[1]
    if all(own == most for own in experts):
        return most
    return upload(torch.tensor(experts), tokens_per_expert.device)


def overflow(assigned: Tensor, kept: Tensor) -> Tensor:
    """The share of the assignments that full experts left out; 0 without any.

    Args:
        assigned, kept: float64 [..., E] counts, without and within the experts' capacity.
    """
    total = assigned.sum(dim=-1)
    return (total - kept.sum(dim=-1)) / total.clamp(min=1.0)


def balance_numbers(counts: Tensor, layers: ExpertLayers, each: bool) -> dict[str, Tensor]:
    """Scalars by name, as they are recorded; none of a model without experts.

    Args:
        counts: float64 [3, layers, E], of :class:`megaforge.training.batch_sums.BatchSums`.
        each: also those of each layer.
    """
    assigned, _, kept = counts
    if not assigned.numel():
        return {}
    entropy, load = entropy_bits(assigned), greatest_loads(assigned, layers.experts)
    used = shares_used(assigned, layers.experts)
    numbers = {"expert_entropy_bits": entropy.mean(), "expert_max_load": load.amax(), "experts_used": used.amin()}
    own = {"expert_entropy_bits": entropy, "expert_max_load": load, "experts_used": used}
    if layers.drop:
        numbers["expert_overflow"] = overflow(assigned.flatten(), kept.flatten())
        own["expert_overflow"] = overflow(assigned, kept)
    if each:
        for name, values in own.items():
            numbers |= {f"{name}/{layer}": value for layer, value in zip(layers.names, values.unbind(), strict=True)}
    return numbers
