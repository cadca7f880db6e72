"""Flags of what is kept of a forward pass until its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class ActivationConfig:
    """What :class:`megaforge.config.run_config.ParallelConfig` has of kept activations."""

    compress_activations: bool = flag(
        False,
        "keep activations for the backward pass in 8 bits a number, one scale for 64 of them; gradients change a "
        "little (plan.py compression measures it); needs --recompute selective",
    )
    sequence_checkpoint: int | None = flag(
        None,
        "keep the state of RWKV-7 and Mamba-2 layers every so many tokens only, and compute what lies between again in "
        "the backward pass, span by span",
        least=16,
        most=1 << 30,
    )
